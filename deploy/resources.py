"""Ray resources of models: bundles, CPU shares, and whether the cluster has enough.

Imports no ray: missing GPUs are reported before Ray starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..cluster.shards.placement import bundles, ray_actor_options, strategy
from ..replicas.device import usable_cores
from ..replicas.errors import ConfigError
from .config import ModelPlan


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """Resources for placing processes. `node_cpus` is the largest node's; `gpus` of all nodes."""

    num_nodes: int
    node_cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class ReplicaRequest:
    """Serve's placement of a replica: one actor, in the first bundle if there are any."""

    actor_options: dict[str, Any]
    device: str  # of the shards: cpu or cuda
    bundles: list[dict[str, float]] | None = None
    strategy: str | None = None


def visible_gpus() -> int:
    """NVIDIA GPUs visible to a process started here; CUDA_VISIBLE_DEVICES may hide some."""
    present = len(list(Path("/dev").glob("nvidia[0-9]*")))
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not present:
        return present
    names = list(takewhile(lambda name: name not in ("", "-1"), (part.strip() for part in named.split(","))))
    return len(names) if any(name.startswith("MIG") for name in names) else min(present, len(names))


def resources_here() -> ClusterResources:
    """This machine's resources, as Ray would detect them."""
    return ClusterResources(1, float(usable_cores()), float(visible_gpus()))


def resources_of_nodes(nodes: Iterable[dict[str, Any]]) -> ClusterResources:
    """The resources of a running Ray, from `ray.nodes()`."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [resources.get("CPU", 0.0) for resources in alive]
    working = sum(amount > 0.0 for amount in cpus)  # a head with num-cpus 0 hosts no replica
    return ClusterResources(
        max(1, working), max(cpus, default=0.0), sum(resources.get("GPU", 0.0) for resources in alive)
    )


def wants_gpu(plan: ModelPlan, available: ClusterResources) -> bool:
    return plan.engine.device == "cuda" or (plan.engine.device == "auto" and available.gpus > 0)


def check_gpus(plans: Sequence[ModelPlan], available: ClusterResources, where: str) -> None:
    """Raise ConfigError if all replicas' ranks need more GPUs than there are. where: "this machine"."""
    asking = [plan for plan in plans if wants_gpu(plan, available)]
    needed = sum(num_replicas(plan) * plan.engine.parallel.world_size for plan in asking)
    if needed <= available.gpus:
        return
    parts = [_ranks_in_words(plan) for plan in asking]
    raise ConfigError(
        f"{needed} GPUs are needed for {', and '.join(parts)}, and {where} has {available.gpus:g}; lower "
        "tensor_parallel_size, pipeline_parallel_size or num_replicas, or take device cpu"
    )


def num_replicas(plan: ModelPlan) -> int:
    """The initial number of replicas."""
    settings = plan.llm.deployment_config
    scaling = settings.autoscaling_config or {}
    return settings.num_replicas or scaling.get("initial_replicas") or scaling.get("min_replicas", 1)


def cpu_share(plans: Sequence[ModelPlan], available: ClusterResources) -> float:
    """The CPUs of each bundle: 1, or less if a node has fewer cores than processes.

    A share only places processes; `num_threads` limits their computation.
    """
    processes = sum(math.ceil(num_replicas(plan) / available.num_nodes) * _num_bundles(plan) for plan in plans)
    if processes <= available.node_cpus or not available.node_cpus:
        return 1.0
    return max(0.01, math.floor(100 * available.node_cpus / processes) / 100)


def replica_request(plan: ModelPlan, available: ClusterResources, num_cpus: float) -> ReplicaRequest:
    """Bundles and actor options of one replica. num_cpus: of each bundle unless the user sets it."""
    parallel, wanted = plan.engine.parallel, plan.llm.placement_group_config
    device = "cuda" if wants_gpu(plan, available) else "cpu"
    made = bundles(
        parallel,
        num_cpus=num_cpus,
        num_gpus_per_shard=1.0 if device == "cuda" else 0.0,
        accelerator_type=plan.llm.accelerator_type,
    )
    if wanted is not None and (ranks := wanted.rank_bundles(parallel.world_size)) is not None:
        made[-parallel.world_size :] = ranks
    options = {**ray_actor_options(made[0]), **plan.llm.deployment_config.ray_actor_options}
    if plan.llm.runtime_env is not None:
        options["runtime_env"] = plan.llm.runtime_env
    if parallel.world_size == 1:
        return ReplicaRequest(options, device)
    made[0] = _bundle_of(options)  # the user may have asked for more
    chosen = wanted.strategy if wanted is not None else None
    return ReplicaRequest(options, device, made, chosen or strategy(parallel))


def _bundle_of(actor_options: dict[str, Any]) -> dict[str, float]:
    found = {"CPU": actor_options["num_cpus"], "GPU": actor_options["num_gpus"], **actor_options.get("resources", {})}
    return {name: amount for name, amount in found.items() if amount}


def _num_bundles(plan: ModelPlan) -> int:
    world_size = plan.engine.parallel.world_size
    return world_size if world_size == 1 else world_size + 1


def _ranks_in_words(plan: ModelPlan) -> str:
    parallel, copies = plan.engine.parallel, num_replicas(plan)
    many = f"{copies} replicas" if copies > 1 else "a replica"
    return (
        f"{many} of {plan.name} with tensor_parallel_size {parallel.tensor_parallel_size} and "
        f"pipeline_parallel_size {parallel.pipeline_parallel_size}"
    )
