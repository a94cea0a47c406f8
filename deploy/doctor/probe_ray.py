"""Probe: the nodes of a running Ray, with the versions, memory and clock of each.

Argument: the address, as `ray.init` takes it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from .process import begin, say

_ASKED = 3  # attempts; the shortest round trip bounds the clock best
_DISTRIBUTIONS = ("shoal", "torch", "triton", "ray", "transformers")


def main() -> None:
    limit_s, (address,) = begin()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        say(missing=" ".join(str(error).split())[:300])
        return
    alive = [node for node in ray.nodes() if node["Alive"]]
    for node in alive:
        say(node=node["NodeID"], host=node["NodeManagerAddress"], resources=node["Resources"])
    deadline = time.monotonic() + limit_s / 2  # the rest is for Ray itself
    for node in alive:
        _ask(node["NodeID"], deadline)


def _ask(node: str, deadline: float) -> None:
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_describe).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
    )
    rounds = []
    facts: dict[str, Any] = {}
    try:
        for _ in range(_ASKED):
            sent = time.time()
            facts = ray.get(task.remote(_DISTRIBUTIONS), timeout=max(0.1, deadline - time.monotonic()))
            got = time.time()
            rounds.append((got - sent, facts.pop("time") - (sent + got) / 2))
    except (GetTimeoutError, RayError) as error:
        say(asked=node, error=" ".join(str(error).split())[:300] or type(error).__name__)
        return
    took, ahead = min(rounds)
    say(asked=node, ahead_s=ahead, uncertain_s=took / 2, **facts)


def _describe(distributions: tuple[str, ...]) -> dict[str, Any]:
    """Runs in a worker that may lack Shoal: standard library only."""
    import os
    import platform
    import time
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    shm = os.statvfs("/dev/shm")
    free, size = shm.f_frsize * shm.f_bavail, shm.f_frsize * shm.f_blocks
    return {"time": time.time(), "versions": versions, "shm_free_bytes": free, "shm_size_bytes": size}


if __name__ == "__main__":
    main()
