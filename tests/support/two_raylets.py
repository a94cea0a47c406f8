"""A replica over two raylets of one Ray; one raylet is killed. A separate process, since Ray is one per process.

    python -m tests.support.two_raylets CHECKPOINT TENSOR_PARALLEL_SIZE PIPELINE_PARALLEL_SIZE

The head has room for the replica's process and half of its ranks, the second node for the other half. While a request
is answered the second node is killed; once Ray has said that there is no room, a third one comes. What has been seen
goes to stdout as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

# Read by Ray when it is imported. Nodes that are gone are noticed within 3 s, as `shoal serve` sets it.
os.environ |= {
    "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

import ray
from ray import serve
from ray.cluster_utils import Cluster

from shoal.cluster.replica.replica import Replica, ReplicaOptions
from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.router import Router
from shoal.cluster.shards.placement import ray_actor_options
from shoal.cluster.wire.directory import DirectoryClient
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams

PATIENCE = 120.0  # seconds; only a failing test waits so long
NUM_TOKENS = 200
PROMPT = (5, 6, 7, 8)


def config(checkpoint: str, tp: int, pp: int) -> EngineConfig:
    return EngineConfig(
        ModelConfig(checkpoint, max_model_len=256),
        CacheConfig(num_blocks=64),
        parallel=ParallelConfig(tp, pp),
        device="cpu",
        num_threads=1,
    )


def request(name: str) -> Request:
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, temperature=1.0, seed=3)
    return Request(name, PROMPT, sampling)


def alone(config: EngineConfig) -> list[int]:
    """The tokens of one process."""
    engine = build_engine(config)
    (completion,) = generate(engine, [request("alone")])["alone"]
    engine.shutdown()
    return completion.token_ids


def deployment(world_size: int) -> Any:
    """A replica whose own process stays on the head."""
    bundles = [{"CPU": 1.0, "head": 1.0}, *({"CPU": 1.0} for _ in range(world_size))]
    return serve.deployment(
        Replica,  # pyright: ignore[reportArgumentType]
        name="replica",
        placement_group_bundles=bundles,
        placement_group_strategy="PACK",
        ray_actor_options=ray_actor_options(bundles[0]),
        health_check_period_s=1,
        health_check_timeout_s=3,
    )


async def eventually(condition: Callable[[], Any]) -> Any:
    """The condition's first value that is true."""
    async with asyncio.timeout(PATIENCE):
        while not (value := await asyncio.to_thread(condition)):
            await asyncio.sleep(0.1)
    return value


async def answered(router: Router, name: str, after_first: Callable[[], Awaitable[None]] | None = None) -> list[int]:
    """The tokens of a request; `after_first` is run once the first has come."""
    tokens: list[int] = []
    async for deltas in router.generate("model", request(name)):
        for delta in deltas:
            assert delta.error is None, delta.error
            tokens += delta.token_ids
        if after_first is not None:
            await after_first()
            after_first = None
    return tokens


def groups(state: str) -> list[dict[str, Any]]:
    """The placement groups in that state: the replica's alone."""
    return [group for group in ray.util.placement_group_table().values() if group["state"] == state]


def nodes_of_bundles() -> list[str]:
    (group,) = groups("CREATED")
    return [group["bundles_to_node_id"][bundle] for bundle in sorted(group["bundles"])]


def why_not_placed() -> str:
    """Ray's reason for which a replica waits for its place."""
    states = {group["stats"]["scheduling_state"] for group in groups("PENDING")}
    return ", ".join(states - {"QUEUED"})


async def scenario(cluster: Cluster, num_far: int) -> dict[str, Any]:
    client = DirectoryClient()
    router = Router(client, await client.secret(), RouterOptions(replay_timeout=2 * PATIENCE))
    await router.start()
    await eventually(lambda: router.replicas("model"))
    seen: dict[str, Any] = {"nodes": nodes_of_bundles(), "undisturbed": await answered(router, "undisturbed")}

    async def kill_a_node() -> None:
        (second,) = cluster.worker_nodes
        await asyncio.to_thread(cluster.remove_node, second, allow_graceful=False)
        await eventually(lambda: not router.replicas("model"))
        seen["reason"] = await eventually(why_not_placed)
        cluster.add_node(num_cpus=num_far)  # only in the main thread

    seen["killed"] = await answered(router, "killed", kill_a_node)
    seen["nodes after"] = nodes_of_bundles()
    await router.close()
    return seen


def main() -> None:
    checkpoint, (tp, pp) = sys.argv[1], map(int, sys.argv[2:])
    num_far = tp * pp // 2
    folder = tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp")  # short: it holds UNIX sockets
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1 + tp * pp - num_far,
            "resources": {"head": 1},
            "include_dashboard": False,
            "temp_dir": folder,
        },
    )
    try:
        cluster.add_node(num_cpus=num_far)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        bound = deployment(tp * pp).bind("model", config(checkpoint, tp, pp), ReplicaOptions())
        serve.run(bound, name="app", route_prefix=None)
        seen = asyncio.run(scenario(cluster, num_far))
        print(json.dumps({**seen, "alone": alone(config(checkpoint, 1, 1))}), flush=True)
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
