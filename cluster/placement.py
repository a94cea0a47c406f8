"""What a replica asks of Ray: the bundles of its placement group and the options of its own actor."""

from __future__ import annotations

from typing import Any

from ..replicas.config import ParallelConfig


def bundles(
    parallel: ParallelConfig, *, num_cpus: float, num_gpus_per_shard: float, accelerator_type: str | None = None
) -> list[dict[str, float]]:
    """One bundle for the replica's process, and one for every shard where there is more than one.

    A single shard runs inside the replica's process, so that its GPU belongs to the first bundle. `num_cpus` are for
    the replica's process: on CPU its shard computes with them.
    """
    shard: dict[str, float] = {"CPU": 1.0}
    if num_gpus_per_shard:
        shard["GPU"] = num_gpus_per_shard
    if accelerator_type is not None:
        shard[f"accelerator_type:{accelerator_type}"] = 0.001  # Ray's way to say "on a node that has it"
    if parallel.world_size == 1:
        return [{**shard, "CPU": num_cpus}]
    return [{"CPU": num_cpus}, *(dict(shard) for _ in range(parallel.world_size))]


def ray_actor_options(replica_bundle: dict[str, float]) -> dict[str, Any]:
    """The resources of the replica's actor: all of its bundle."""
    custom = {name: amount for name, amount in replica_bundle.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "num_cpus": replica_bundle.get("CPU", 0.0),
        "num_gpus": replica_bundle.get("GPU", 0.0),
    }
    if custom:
        options["resources"] = custom
    return options
