"""Whether all bundles of all replicas fit the nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import ModelPlan
from ..resources import ReplicaRequest, num_replicas
from .finding import Finding, Status

Resources = dict[str, float]


def findings(
    plans: Sequence[tuple[ModelPlan, ReplicaRequest]], nodes: Sequence[Mapping[str, float]], where: str
) -> list[Finding]:
    """Whether replicas fit empty nodes, placed one after the other. where: "this machine"."""
    free = [dict(node) for node in nodes]
    found = []
    for plan, request in plans:
        wanted = num_replicas(plan)
        placed = sum(place(request, free) for _ in range(wanted))
        needed = bundles_of(request)
        each = f"{len(needed)} processes with {_in_words(_sum(needed))}"
        if request.strategy == "STRICT_PACK":
            each += " on one node"
        status = Status.OK if placed == wanted else Status.WRONG
        message = f"{plan.name}: {placed} of {wanted} replicas fit {where}; each needs {each}"
        remedy = ""
        if placed < wanted:
            remedy = (
                f"add nodes, or ask for less: num_replicas, tensor_parallel_size; {where} has {_in_words(_sum(nodes))}"
            )
        found.append(Finding("placement", status, message, remedy, {"placed": placed, "wanted": wanted}))
    return found


def bundles_of(request: ReplicaRequest) -> list[Resources]:
    """The bundles that Ray reserves for one replica."""
    if request.bundles is not None:
        return request.bundles
    options = request.actor_options
    return [{"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options.get("resources", {})}]


def place(request: ReplicaRequest, free: list[Resources]) -> bool:
    """Take one replica's bundles out of `free` if all fit, with Ray's strategy: packed, or spread."""
    needed = bundles_of(request)
    groups = [_sum(needed)] if request.strategy == "STRICT_PACK" else [dict(bundle) for bundle in needed]
    left = [dict(node) for node in free]
    taken: set[int] = set()
    for group in groups:
        fitting = [i for i, node in enumerate(left) if _fits(group, node)]
        if request.strategy == "STRICT_SPREAD":
            fitting = [i for i in fitting if i not in taken]
        if not fitting:
            return False
        # Prefer a node that holds bundles of this replica.
        spread = request.strategy in ("SPREAD", "STRICT_SPREAD")
        chosen = min(fitting, key=lambda i: (i in taken) == spread)
        taken.add(chosen)
        for name, amount in group.items():
            left[chosen][name] = left[chosen].get(name, 0.0) - amount
    free[:] = left
    return True


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items())


def _sum(bundles: Sequence[Mapping[str, float]]) -> Resources:
    total: Resources = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _in_words(resources: Mapping[str, float]) -> str:
    shown = {name: amount for name, amount in resources.items() if amount and not name.startswith(("node:", "memory"))}
    parts = [f"{amount:g} {name}" for name, amount in shown.items() if name != "object_store_memory"]
    return ", ".join(parts) or "nothing"
