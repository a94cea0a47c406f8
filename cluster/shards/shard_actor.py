"""A rank as a Ray actor, and the handle with which its group controls it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.exceptions import RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...replicas.config import EngineConfig, ResolvedConfig
from ...replicas.engine.engine import Engine
from ...replicas.errors import ConfigError, ShardGroupError
from ...replicas.executors.step_watchdog import is_stopped
from ...replicas.offline import build_engine
from ..ray_api import bundle_specs, create_actor, kill_actor, node_address, node_id
from ..wire.logs import RankLog
from .placement import ActorPlacement, ray_actor_options
from .shard_group import DriverNode, ShardGroup, start_shard_group

if TYPE_CHECKING:
    from ...replicas.channel.step_sockets import Address
    from ...replicas.executors.group_start import Loaded
    from ...replicas.executors.shard_rank import ShardRank


_KILL_GRACE_MS = 500  # takes 11 ms on an idle machine


class ShardActor:
    """The actor's class: a `ShardRank` in its own process, one call at a time.

    The result of the last call, `serve`, reports the rank's end to the group.
    """

    _rank: ShardRank

    def __init__(self, log: RankLog | None = None) -> None:
        self._log = log

    def placement(self) -> ActorPlacement:
        context = ray.get_runtime_context()
        gpus = tuple(context.get_accelerator_ids().get("GPU", ()))
        return ActorPlacement(context.get_node_id(), node_address(), os.getpid(), gpus)

    def assign(self, config: ResolvedConfig, rank: int, local_rank: int, visible_gpus: tuple[str, ...]) -> None:
        """Become a rank. visible_gpus: the GPUs of cuda:0, cuda:1, ..."""
        if visible_gpus:
            # Not by runtime_env: it needs the GPUs too early, and fails if Python's path contains a space.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus)
        if self._log is not None:
            self._log.start(rank)
        from ...replicas.executors.shard_rank import (
            ShardRank,  # loads torch, which reads the environment
        )

        self._rank = ShardRank(config, rank, local_rank)

    def open_store(self, host: str) -> tuple[str, int]:
        return self._rank.open_store(host)

    def join(self, store: tuple[str, int], timeout_s: float) -> None:
        self._rank.join(store, timeout_s)

    def load(self) -> Loaded:
        return self._rank.load()

    def serve(self, address: Address, token: bytes) -> None:
        self._rank.serve(address, token)


class ShardActorHandle:
    """A shard actor in a bundle of a placement group; see `ShardHandle`.

    Never restarted: its state would be lost.
    """

    def __init__(self, group: PlacementGroup, bundle: int, log: RankLog | None = None) -> None:
        options = {
            **ray_actor_options(bundle_specs(group)[bundle]),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        self._actor = create_actor(ShardActor, options, log)
        self._name = f"the actor of bundle {bundle}"
        self._title = "shard"  # its name in Ray and in `ps`
        self._placement: ActorPlacement | None = None
        self._process: int | None = None  # pidfd of its process, if on this node
        self._ending = threading.Lock()  # two threads may end the group

    def call(self, method: str, *args: object) -> Future[Any]:
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()

        def pass_on(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                answer.set_result(done.result())
            else:
                answer.set_exception(_plain(error))

        remote = getattr(self._actor, method).options(name=f"{self._title}.{method}")
        remote.remote(*args).future().add_done_callback(pass_on)
        return answer

    def __str__(self) -> str:
        return self._name

    def assigned(self, rank: int, world_size: int, placement: ActorPlacement) -> None:
        self._name = f"rank {rank} of {world_size} ({placement})"
        self._title = f"shard {rank} of replica {os.getpid()}"
        self._placement = placement
        if placement.node_id == node_id() and self._process is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                self._process = os.pidfd_open(placement.pid)

    def is_stopped(self) -> bool:
        return self._process is not None and self._placement is not None and is_stopped(self._placement.pid)

    def kill(self) -> None:
        with self._ending:
            process, self._process = self._process, None
        try:
            kill_actor(self._actor)
        finally:
            if process is not None:
                _end(process)
                os.close(process)


def _end(process: int) -> None:
    """Wait for the end of a killed process, then send SIGKILL. process: a pidfd.

    Ray kills a stopped process after 5 s only, and until then a new rank finds its GPU memory in use.
    """
    poll = select.poll()
    poll.register(process, select.POLLIN)
    if not poll.poll(_KILL_GRACE_MS):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)


def _plain(error: BaseException) -> BaseException:
    """The error of the actor's method, or a one-line ShardGroupError for a dead actor."""
    if isinstance(error, RayTaskError):
        return cast("Any", error).cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reasons = [line for line in lines if "because" in line] or lines[-1:]
    reason = " ".join(reasons).partition(" Some common causes")[0]
    return ShardGroupError(f"its process has ended ({reason})")


def build_sharded_engine(config: EngineConfig, *, timeout_s: float) -> tuple[Engine, ShardGroup]:
    """Build an engine over shard actors in the calling replica's placement group.

    Raises ConfigError, ModelError and ShardGroupError.
    """
    group = _own_placement_group(config.parallel.world_size)
    driver_node = DriverNode(node_id(), node_address())
    log = RankLog.of_this_replica()
    made: list[ShardGroup] = []

    def start(resolved: ResolvedConfig) -> ShardGroup:
        made.append(
            start_shard_group(resolved, lambda i: ShardActorHandle(group, i + 1, log), driver_node, timeout_s=timeout_s)
        )
        return made[0]

    try:
        return build_engine(config, device=_device(config.device, group), start=start), made[0]
    except BaseException:
        for shards in made:
            shards.kill()
        raise


def _own_placement_group(world_size: int) -> PlacementGroup:
    group = ray.util.get_current_placement_group()
    found = "has none" if group is None else f"has {group.bundle_count} bundles"
    if group is None or group.bundle_count != world_size + 1:
        raise ConfigError(
            f"a replica of {world_size} ranks needs a placement group of {world_size + 1} bundles, and this one "
            f"{found}; give the deployment placement_group_bundles: the replica's, then one for every rank"
        )
    return group


def _device(asked: str, group: PlacementGroup) -> str:
    """The ranks' device, from their bundles: the replica's own process may see no GPU."""
    with_gpu = any(bundle.get("GPU") for bundle in bundle_specs(group)[1:])
    if asked == "cuda" and not with_gpu:
        raise ConfigError("device is cuda, but the ranks' bundles have no GPU; put GPU: 1 into each, or use device cpu")
    return "cuda" if with_gpu and asked != "cpu" else "cpu"
