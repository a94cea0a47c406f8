"""What a replica asks of Ray, and which of the actors that it gets becomes which rank.

A replica of several shards has a placement group of its own: bundle 0 is the replica's process, the bundles after it
hold one shard actor each. Ray gives every actor a place; `seat` then makes ranks of them, so that the ranks of one
pipeline stage sit together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...replicas.config import ParallelConfig


def bundles(
    parallel: ParallelConfig, *, num_cpus: float, num_gpus_per_shard: float, accelerator_type: str | None = None
) -> list[dict[str, float]]:
    """One bundle for the replica's process, and one for every shard where there is more than one.

    A single shard runs inside the replica's process, so that its GPU belongs to the first bundle. `num_cpus` are those
    of each bundle; a share of one where a node has fewer cores than processes.
    """
    shard: dict[str, float] = {"CPU": num_cpus}
    if num_gpus_per_shard:
        shard["GPU"] = num_gpus_per_shard
    if accelerator_type is not None:
        shard[f"accelerator_type:{accelerator_type}"] = 0.001  # Ray's way to say "on a node that has it"
    if parallel.world_size == 1:
        return [shard]
    return [{"CPU": num_cpus}, *(dict(shard) for _ in range(parallel.world_size))]


def strategy(parallel: ParallelConfig) -> str:
    """Ray's placement strategy for the bundles: one node, unless there are stages that may lie on several.

    Ranks of a stage exchange every layer's activations and want NVLink between them; stages exchange them once a step.
    """
    return "PACK" if parallel.pipeline_parallel_size > 1 else "STRICT_PACK"


def ray_actor_options(bundle: dict[str, float]) -> dict[str, Any]:
    """The resources of the actor that takes all of a bundle."""
    custom = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {"num_cpus": bundle.get("CPU", 0.0), "num_gpus": bundle.get("GPU", 0.0)}
    if custom:
        options["resources"] = custom
    return options


@dataclass(frozen=True, slots=True)
class ActorPlacement:
    """Where Ray has put an actor."""

    node_id: str
    host: str  # the node's address
    pid: int
    gpus: tuple[str, ...]  # Ray's names of the GPUs that it may use: indices, or UUIDs

    def __str__(self) -> str:
        gpus = f", GPU {' and '.join(self.gpus)}" if self.gpus else ""
        return f"node {self.host}, process {self.pid}{gpus}"


@dataclass(frozen=True, slots=True)
class RankAssignment:
    """A rank of a group: the actor that is it, and the devices that it sees.

    Ray shows each actor its own GPU alone, so that every rank would compute on a `cuda:0`; symmetric memory refuses
    ranks that call their devices the same. All ranks of a node therefore see the same GPUs, the group's, in one order.
    """

    actor: int
    placement: ActorPlacement
    local_rank: int  # among the group's ranks on this node; with GPUs, the index of this rank's among visible_gpus
    visible_gpus: tuple[str, ...]


def assign_ranks(placements: list[ActorPlacement], parallel: ParallelConfig, driver_node: str) -> list[RankAssignment]:
    """The seats by world rank (stage x tensor_parallel_size + tensor-parallel rank).

    A node takes as many whole stages as it has actors for, the replica's node `home` first; only what remains of the
    nodes makes stages that are spread over several (`spread_stages` names them). Ranks of a node follow its GPUs.
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
    assignments = []
    for actor in whole + rest:
        placement = placements[actor]
        neighbours = nodes[placement.node_id]
        visible = tuple(gpu for neighbour in neighbours for gpu in placements[neighbour].gpus)
        assignments.append(RankAssignment(actor, placement, neighbours.index(actor), visible))
    return assignments


def spread_stages(assignments: list[RankAssignment], parallel: ParallelConfig) -> list[int]:
    """The pipeline stages whose ranks lie on more than one node."""
    tp = parallel.tensor_parallel_size
    stages = [assignments[first : first + tp] for first in range(0, len(assignments), tp)]
    return [i for i, stage in enumerate(stages) if len({assignment.placement.node_id for assignment in stage}) > 1]
