"""Start and shutdown of a model copy over several shard actors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ...replicas.channel.step_channel import StepChannelServer
from ...replicas.config import ResolvedConfig
from ...replicas.errors import ShardGroupError
from ...replicas.executors.group_executor import GroupExecutor
from ...replicas.executors.group_start import GroupStart, Loaded, RankHandle
from .placement import ActorPlacement, assign_ranks, spread_stages

logger = logging.getLogger(__name__)

_LEAVE_SECONDS = 5.0  # for ranks to exit by themselves after the last plan


class ShardHandle(RankHandle, Protocol):
    """Controls one shard actor; `call` names methods of ShardActor. Implemented in `shard_actor.py`."""

    def assigned(self, rank: int, world_size: int, placement: ActorPlacement) -> None:
        """Record the actor's rank and placement."""
        ...

    def kill(self) -> None:
        """End the actor's process in any state. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class DriverNode:
    """The node of the engine's process."""

    node_id: str
    host: str


class ShardGroup(GroupExecutor):
    """The ranks of one model copy as actors; implements `Executor`."""

    def __init__(
        self, loaded: Loaded, server: StepChannelServer, shards: Sequence[ShardHandle], runs: Sequence[Future[Any]]
    ) -> None:
        super().__init__(loaded, server, shards, runs)
        self._shards = tuple(shards)

    def shutdown(self) -> None:
        """End the plans, and kill the ranks that do not exit."""
        super().shutdown()
        wait(self.runs, 0.0 if self.failed else _LEAVE_SECONDS)
        _kill(self._shards)

    def kill(self) -> None:
        """End every rank at once, including stopped and hanging ones."""
        self.failed = True
        self.shutdown()


def start_shard_group(
    config: ResolvedConfig, launch: Callable[[int], ShardHandle], driver_node: DriverNode, *, timeout_s: float
) -> ShardGroup:
    """Start one shard actor per rank and form the group.

    launch: starts the n-th actor. timeout_s: until all ranks wait for a plan. Raises a rank's ConfigError
    or ModelError, otherwise ShardGroupError with rank, node and reason, and kills all actors.
    """
    begin = time.monotonic()
    start = GroupStart(config, timeout_s)
    actors: list[ShardHandle] = []
    try:
        for index in range(config.parallel.world_size):
            actors.append(launch(index))
        placements: list[ActorPlacement] = start.call_all("start", actors, "placement")
        ranks = _assign_ranks(start, config, actors, placements, driver_node)
        nodes = [rank.placement.node_id for rank in ranks]
        # The store listens on loopback if all ranks are on one node.
        meeting_host = "127.0.0.1" if len(set(nodes)) == 1 else ranks[0].placement.host
        shards = [rank.shard for rank in ranks]
        loaded = start.load(shards, meeting_host)
        server, runs = start.connect(shards, [node != driver_node.node_id for node in nodes], driver_node.host)
    except BaseException:
        _kill(actors)
        raise
    names = ", ".join(map(str, shards))
    logger.info("a group of %d ranks is ready after %.1f s: %s", len(shards), time.monotonic() - begin, names)
    return ShardGroup(loaded, server, shards, runs)


class _Rank(NamedTuple):
    shard: ShardHandle
    placement: ActorPlacement


def _assign_ranks(
    start: GroupStart,
    config: ResolvedConfig,
    actors: Sequence[ShardHandle],
    placements: list[ActorPlacement],
    driver_node: DriverNode,
) -> list[_Rank]:
    """Assign ranks to the actors; returns them by rank."""
    parallel = config.parallel
    assignments = assign_ranks(placements, parallel, driver_node.node_id)
    ranks = [_Rank(actors[assignment.actor], assignment.placement) for assignment in assignments]
    for rank, (shard, placement) in enumerate(ranks):
        shard.assigned(rank, parallel.world_size, placement)
        if config.device == "cuda" and len(placement.gpus) != 1:
            raise ShardGroupError(
                f"{shard} has been given {len(placement.gpus)} GPUs ({', '.join(placement.gpus) or 'none'}); each rank "
                "needs exactly one: put GPU: 1 into each bundle but the first"
            )
    for stage in spread_stages(assignments, parallel):
        logger.warning(
            "the %d tensor-parallel ranks of stage %d lie on several nodes, which makes every layer wait for the "
            "network; use the placement strategy STRICT_PACK, or a smaller tensor_parallel_size with more stages",
            parallel.tensor_parallel_size,
            stage,
        )
    arguments = [
        (config, rank, assignment.local_rank, assignment.visible_gpus) for rank, assignment in enumerate(assignments)
    ]
    start.call_each("prepare", [rank.shard for rank in ranks], "assign", arguments)
    return ranks


def _kill(shards: Sequence[ShardHandle]) -> None:
    for shard in shards:
        try:
            shard.kill()
        except Exception as error:
            logger.warning("could not end %s: %s", shard, error)
