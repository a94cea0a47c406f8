"""The directory without Ray, as an actor, and with a registering replica."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from shoal.cluster.wire.directory import Directory
from shoal.cluster.wire.membership import ReplicaInfo
from tests.support.cluster import eventually, in_loop

INFO = ReplicaInfo("r0", "m", "127.0.0.1", 4000, epoch=1)


@in_loop
async def test_a_watch_returns_with_the_news() -> None:
    directory = Directory(b"s")
    version = (await directory.watch(None)).version
    watch = asyncio.create_task(directory.watch(version))
    await asyncio.sleep(0)
    assert not watch.done()
    await directory.register(INFO)
    membership = await watch
    assert membership.replicas == (INFO,)
    assert membership.version != version


@in_loop
async def test_what_is_not_new_is_no_news() -> None:
    directory = Directory(b"s")
    await directory.register(INFO)
    version = (await directory.watch(None)).version
    await directory.register(INFO)
    await directory.deregister("unknown", 1)
    assert (await directory.watch(version, timeout=0.0)).version == version
    await directory.register(replace(INFO, draining=True))
    assert (await directory.watch(version)).replicas[0].draining


@in_loop
async def test_a_new_life_replaces_the_old_one_and_an_old_farewell_does_not_touch_it() -> None:
    directory = Directory(b"s")
    await directory.register(INFO)
    reborn = replace(INFO, epoch=2, port=4001)
    await directory.register(reborn)
    await directory.deregister(INFO.replica_id, INFO.epoch)
    assert (await directory.watch(None)).replicas == (reborn,)
    await directory.deregister(reborn.replica_id, reborn.epoch)
    assert (await directory.watch(None)).replicas == ()


@in_loop
async def test_a_model_that_stops_is_told_until_it_is_served_anew() -> None:
    directory = Directory(b"s")
    await directory.register(INFO)
    version = (await directory.watch(None)).version
    await directory.stop(frozenset({"m", "other"}))
    assert (await directory.watch(version)).stopping == {"m", "other"}
    await directory.register(INFO)
    assert (await directory.watch(None)).stopping == {"m", "other"}, "the replica has not gone yet"
    await directory.register(replace(INFO, replica_id="r1"))
    assert (await directory.watch(None)).stopping == {"other"}


@in_loop
async def test_a_replica_that_is_silent_is_forgotten() -> None:
    directory = Directory(b"s", time_to_live=0.01)
    await directory.register(INFO)
    version = (await directory.watch(None)).version
    assert (await directory.watch(version)).replicas == ()


@pytest.mark.usefixtures("local_ray")
def test_all_clients_meet_one_directory_and_it_survives_its_death() -> None:
    import ray

    from shoal.cluster.wire.directory import DirectoryClient, get_or_create_directory
    from shoal.cluster.wire.errors import DirectoryUnavailable

    async def patiently(ask: Any) -> Any:
        """Retry while the directory is unavailable, as clients do."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await ask()
                except DirectoryUnavailable:
                    await asyncio.sleep(0.05)

    async def scenario() -> None:
        one, two = DirectoryClient("test-directory"), DirectoryClient("test-directory")
        secret = await one.secret()
        assert len(secret) == 32
        assert await two.secret() == secret
        await one.register(INFO)
        before = await two.watch(None)
        assert before.replicas == (INFO,)

        ray.kill(get_or_create_directory("test-directory"), no_restart=False)
        empty = await patiently(lambda: two.watch(before.version))
        assert empty.version != before.version
        assert await patiently(two.secret) == secret
        await patiently(lambda: one.register(INFO))
        assert (await patiently(lambda: two.watch(None))).replicas == (INFO,)

    try:
        asyncio.run(scenario())
    finally:
        ray.kill(ray.get_actor("test-directory", namespace="shoal"))


@pytest.mark.usefixtures("local_ray")
def test_a_replica_registers_streams_and_leaves() -> None:
    import ray

    from shoal.cluster.replica.replica import ReplicaOptions
    from shoal.cluster.router.router import Router
    from shoal.cluster.wire.directory import DirectoryClient
    from tests.support.cluster import request
    from tests.support.engines import naive
    from tests.support.fake_engine_replica import FakeModelReplica

    async def scenario() -> None:
        options = ReplicaOptions(directory="replica-directory", host="127.0.0.1")
        actor: Any = ray.remote(FakeModelReplica)  # pyright: ignore[reportCallIssue]
        replica = actor.options(num_cpus=0).remote("fake", None, options)
        client = DirectoryClient("replica-directory")
        await replica.check_health.remote()
        router = Router(client, await client.secret())
        await router.start()
        ((info, load),) = router.replicas("fake")
        assert info == await replica.info.remote()
        assert (info.host, load.num_free_blocks) == ("127.0.0.1", 64)
        asked = request(samples=2, max_tokens=12)
        deltas = [delta async for new in router.generate("fake", asked) for delta in new]
        for sample, (output, reason, _) in enumerate(naive(asked)):
            mine = [delta for delta in deltas if delta.sample == sample]
            assert [token for delta in mine for token in delta.token_ids] == output
            assert mine[-1].finish_reason is reason
        assert (await router.block_reports("fake"))[0]["requests"] == {}
        assert await router.reset_prefix_cache("fake")
        await replica.drain.remote()
        assert (await client.watch(None)).replicas == (replace(info, draining=True),)
        await replica.close.remote()
        assert (await client.watch(None)).replicas == ()
        await eventually(lambda: router.replicas("fake") == [])
        await router.close()
        ray.kill(replica)

    try:
        asyncio.run(scenario())
    finally:
        ray.kill(ray.get_actor("replica-directory", namespace="shoal"))


async def until_it_dies(actor: Any) -> None:
    while True:
        await actor.load.remote()


@pytest.mark.usefixtures("local_ray")
def test_a_replica_whose_engine_fails_exits_and_its_requests_go_elsewhere() -> None:
    import ray
    from ray.exceptions import RayActorError

    from shoal.cluster.replica.replica import ReplicaOptions
    from shoal.cluster.router.router import Router
    from shoal.cluster.wire.directory import DirectoryClient
    from tests.support.cluster import request
    from tests.support.engines import naive
    from tests.support.fake_engine_replica import FakeModelReplica

    async def scenario() -> None:
        options = ReplicaOptions(directory="failing-directory")
        actor: Any = ray.remote(FakeModelReplica)  # pyright: ignore[reportCallIssue]
        failing = actor.options(num_cpus=0).remote("fake", None, options, fail_step=5)
        await failing.check_health.remote()
        client = DirectoryClient("failing-directory")
        router = Router(client, await client.secret())
        await router.start()
        asked = request(max_tokens=40, ignore_eos=True)
        stream = router.generate("fake", asked)
        output = [token for delta in await anext(stream) for token in delta.token_ids]
        with pytest.raises(RayActorError):
            await until_it_dies(failing)
        healthy = actor.options(num_cpus=0).remote("fake", None, options)
        async for deltas in stream:
            output += [token for delta in deltas for token in delta.token_ids]
        assert output == naive(asked)[0][0]
        await router.close()
        ray.kill(healthy)

    try:
        asyncio.run(scenario())
    finally:
        ray.kill(ray.get_actor("failing-directory", namespace="shoal"))
