"""Bundles of a replica for Ray, and the assignment of ranks to actors.

The placement group of several shards has bundle 0 for the replica's process, then one per shard actor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...replicas.config import ParallelConfig


def bundles(
    parallel: ParallelConfig, *, num_cpus: float, num_gpus_per_shard: float, accelerator_type: str | None = None
) -> list[dict[str, float]]:
    """The bundles of a replica: one for its process, and one per shard if there are several.

    num_cpus: of each bundle; below 1 if a node has fewer cores than processes.
    """
    shard: dict[str, float] = {"CPU": num_cpus}
    if num_gpus_per_shard:
        shard["GPU"] = num_gpus_per_shard
    if accelerator_type is not None:
        shard[f"accelerator_type:{accelerator_type}"] = 0.001  # Ray's idiom: on a node that has it
    if parallel.world_size == 1:
        return [shard]
    return [{"CPU": num_cpus}, *(dict(shard) for _ in range(parallel.world_size))]


def strategy(parallel: ParallelConfig) -> str:
    """Ray's placement strategy: one node, unless pipeline stages may be on several.

    Ranks of a stage exchange activations in every layer, stages once a step.
    """
    return "PACK" if parallel.pipeline_parallel_size > 1 else "STRICT_PACK"


def ray_actor_options(bundle: dict[str, float]) -> dict[str, Any]:
    """Actor options that use a whole bundle."""
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {"num_cpus": bundle.get("CPU", 0.0), "num_gpus": bundle.get("GPU", 0.0)}
    if custom:
        options["resources"] = custom
    return options


@dataclass(frozen=True, slots=True)
class ActorPlacement:
    """The node, process and GPUs of an actor."""

    node_id: str
    host: str  # the node's address
    pid: int
    gpus: tuple[str, ...]  # Ray's ids of its GPUs: indices or UUIDs

    def __str__(self) -> str:
        gpus = f", GPU {' and '.join(self.gpus)}" if self.gpus else ""
        return f"node {self.host}, process {self.pid}{gpus}"


@dataclass(frozen=True, slots=True)
class RankAssignment:
    """The actor and the visible devices of one rank.

    All ranks of a node see the same GPUs, the group's, in one order. Ray would show each actor its own GPU
    as `cuda:0`, and symmetric memory refuses ranks with equal devices.
    """

    actor: int
    placement: ActorPlacement
    local_rank: int  # on this node; with GPUs, the index in visible_gpus
    visible_gpus: tuple[str, ...]


def assign_ranks(placements: list[ActorPlacement], parallel: ParallelConfig, driver_node: str) -> list[RankAssignment]:
    """Assignments by world rank (stage x tensor_parallel_size + tensor-parallel rank).

    Each node, `driver_node` first, gets as many whole stages as its actors can form. The remaining actors
    form stages that span nodes. Ranks of a node are in GPU order.
    """
    nodes: dict[str, list[int]] = {}
    for actor, placement in enumerate(placements):
        nodes.setdefault(placement.node_id, []).append(actor)
    for actors in nodes.values():
        actors.sort(key=lambda actor: [(len(gpu), gpu) for gpu in placements[actor].gpus])  # "10" follows "9"
    tp = parallel.tensor_parallel_size
    whole: list[int] = []
    rest: list[int] = []
    for node in sorted(nodes, key=lambda node: node != driver_node):
        split = len(nodes[node]) // tp * tp
        whole += nodes[node][:split]
        rest += nodes[node][split:]
    assignments: list[RankAssignment] = []
    for actor in whole + rest:
        placement = placements[actor]
        neighbours = nodes[placement.node_id]
        visible = tuple(gpu for neighbour in neighbours for gpu in placements[neighbour].gpus)
        assignments.append(RankAssignment(actor, placement, neighbours.index(actor), visible))
    return assignments


def spread_stages(assignments: list[RankAssignment], parallel: ParallelConfig) -> list[int]:
    """Indices of the pipeline stages that span several nodes."""
    tp = parallel.tensor_parallel_size
    stages = [assignments[first : first + tp] for first in range(0, len(assignments), tp)]
    return [i for i, stage in enumerate(stages) if len({assignment.placement.node_id for assignment in stage}) > 1]
