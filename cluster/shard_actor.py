"""A rank of a shard group as a Ray actor, and the handle by which its group drives it."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..replicas.config import EngineConfig
from .placement import Place, ray_actor_options

if TYPE_CHECKING:
    from ..replicas.shard_rank import ShardRank
    from ..replicas.step_sockets import Address


class ShardActor:
    """The actor's class: a `ShardRank` in a process of its own, one call at a time.

    The last call, `serve`, lasts as long as the rank: its reference tells the group when the rank is gone.
    """

    _rank: ShardRank

    def place(self) -> Place:
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), gpus)

    def take_seat(self, config: EngineConfig, rank: int, local_rank: int, visible_gpus: tuple[str, ...]) -> None:
        """Becomes a rank. config: resolved. visible_gpus: those that cuda:0, cuda:1, ... are from now on."""
        if visible_gpus:
            # In place of Ray's own choice, and before CUDA reads it. A runtime_env would have to name the GPUs before
            # they are known, and Ray cannot start workers that have one where the interpreter's path has a space.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus)
        from ..replicas.shard_rank import ShardRank  # here, since it loads torch, which reads the environment

        self._rank = ShardRank(config, rank, local_rank)

    def open_store(self, host: str) -> tuple[str, int]:
        return self._rank.open_store(host)

    def join(self, store: tuple[str, int], timeout_s: float) -> None:
        self._rank.join(store, timeout_s)

    def load(self) -> int:
        return self._rank.load()

    def serve(self, address: Address, token: bytes) -> None:
        self._rank.serve(address, token)


class ShardActorHandle:
    """A shard actor in a bundle of a placement group; see `ShardHandle`.

    It is never restarted: a rank's state is of no use to a group that went on without it.
    """

    def __init__(self, group: PlacementGroup, bundle: int) -> None:
        options = {
            **ray_actor_options(group.bundle_specs[bundle]),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        self._actor = cast("Any", ray.remote(ShardActor)).options(**options).remote()

    def call(self, method: str, *args: object) -> Future[Any]:
        return getattr(self._actor, method).remote(*args).future()

    def kill(self) -> None:
        ray.kill(self._actor)
