"""Replicas under Ray Serve: start, kill, replacement, shutdown."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from typing import Any

import pytest

from shoal.cluster.ray_private import serve_http_address
from shoal.cluster.replica.replica import ReplicaOptions
from shoal.cluster.router.router import Router
from shoal.cluster.wire.directory import DirectoryClient
from shoal.replicas.protocol import TokenDelta
from tests.support.cluster import request
from tests.support.engines import naive
from tests.support.fake_engine_replica import FakeModelReplica

pytestmark = pytest.mark.slow


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.usefixtures("local_ray")
def test_killed_replicas_cost_no_token_and_are_replaced() -> None:
    import ray
    from ray import serve

    options = ReplicaOptions(directory="serve-directory", host="127.0.0.1")
    deployment: Any = serve.deployment(
        FakeModelReplica,  # pyright: ignore[reportArgumentType]
        name="replica",
        num_replicas=2,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        health_check_timeout_s=3,
    )

    async def scenario() -> None:
        client = DirectoryClient("serve-directory")
        router = Router(client, await client.secret())
        await router.start()
        await until(lambda: len(router.replicas("fake")) == 2)
        asked = request(max_tokens=200, ignore_eos=True)
        stream = router.generate("fake", asked)
        deltas: list[TokenDelta] = list(await anext(stream))
        pids = {info.pid for info, _ in router.replicas("fake")}
        for pid in pids:  # both: the stream waits for a replica that is not there yet
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len({info.pid for info, _ in router.replicas("fake")} - pids) == 2)
        deltas += [delta async for new in stream for delta in new]
        assert [token for delta in deltas for token in delta.token_ids] == naive(asked)[0][0]
        samples = [sample for family in router.collector.collect() for sample in family.samples]
        # Once, or twice: by way of the replica that was killed a moment later.
        assert sum(s.value for s in samples if s.name == "shoal_requests_migrated_total") in (1, 2)
        await asyncio.to_thread(serve.delete, "app")
        await until(lambda: router.replicas("fake") == [])
        known = {info.pid for info in (await client.watch(None)).replicas}
        assert known <= pids  # those that left in order are forgotten at once, the killed ones expire
        await router.close()

    try:
        serve.run(deployment.bind("fake", None, options), name="app", route_prefix=None)
        asyncio.run(scenario())
    finally:
        serve.shutdown()
        ray.kill(ray.get_actor("serve-directory", namespace="shoal"))


@pytest.mark.usefixtures("local_ray")
def test_the_address_of_a_running_serve_is_found() -> None:
    from ray import serve

    assert serve_http_address() is None
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = sock.getsockname()
    serve.start(http_options={"host": address[0], "port": address[1]})
    try:
        assert serve_http_address() == address
    finally:
        serve.shutdown()
