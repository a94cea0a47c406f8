"""A model copy over several shard actors: how it is built, watched and taken down.

`start_shard_group` takes the actors through six steps, together: they say where they are, become ranks, meet, load,
and connect to the engine's step channel. A step that fails on one of them fails for all: whatever exists by then is
taken down, and the error says which rank it was, on which node, and why.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from ..replicas.config import EngineConfig
from ..replicas.errors import ConfigError, EngineError, ModelError, ServingError, ShardGroupError
from ..replicas.group_executor import GroupExecutor
from ..replicas.plan import StepPlan, StepResult
from ..replicas.step_channel import StepChannelServer
from ..replicas.step_sockets import Address, ChannelClosed
from .placement import Place, Seat, seat, spread_stages

logger = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 1.0  # after one rank has failed, for others to say why; Ray tells of a death within 0.05 s
_LEAVE_SECONDS = 5.0  # for ranks to leave by themselves once there are no more plans
_TOKEN_BYTES = 32


class ShardHandle(Protocol):
    """One shard actor, as its group drives it. `cluster/shard_actor.py` has Ray's."""

    def call(self, method: str, *args: object) -> Future[Any]:
        """Calls a method of ShardActor. The future fails with what it raises, or when the actor's process ends."""
        ...

    def seated(self, rank: int, place: Place) -> None:
        """Is told which rank the actor will be, and where it is."""
        ...

    def kill(self) -> None:
        """Ends the actor's process, whatever it does. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class Home:
    """The node of the engine's process."""

    node_id: str
    host: str


class ShardGroup:
    """The ranks of one model copy; implements `Executor`.

    A rank that dies in the middle of a step is noticed by `submit` and `result`, which raise EngineError. `watch`
    tells of it also while there is nothing to do.
    """

    def __init__(
        self, executor: GroupExecutor, shards: Sequence[ShardHandle], seats: Sequence[Seat], runs: Sequence[Future[Any]]
    ) -> None:
        self.num_blocks = executor.num_blocks
        self.seats = tuple(seats)
        self._executor = executor
        self._shards = tuple(shards)
        self._runs = tuple(runs)
        self._leaving = threading.Event()

    def submit(self, plan: StepPlan) -> None:
        self._executor.submit(plan)

    def result(self) -> StepResult:
        return self._executor.result()

    def watch(self, on_lost: Callable[[ShardGroupError], None]) -> None:
        """Calls `on_lost` once, from a thread, if a rank ends before `shutdown` or `kill`."""
        threading.Thread(target=self._watch, args=(on_lost,), name="shoal-shards", daemon=True).start()

    def _watch(self, on_lost: Callable[[ShardGroupError], None]) -> None:
        wait(self._runs, return_when=FIRST_COMPLETED)
        if not self._leaving.is_set():
            on_lost(ShardGroupError(f"the shard group has lost {_ended(self.seats, self._runs)}"))

    def shutdown(self) -> None:
        """Tells the ranks that no more plans come, and ends those that do not leave by themselves."""
        self._leaving.set()
        self._executor.shutdown()
        wait(self._runs, _LEAVE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Ends every rank at once, also one that is stopped or hangs."""
        self._leaving.set()
        _kill(self._shards)


def start_shard_group(
    config: EngineConfig, launch: Callable[[int], ShardHandle], home: Home, *, timeout_s: float
) -> ShardGroup:
    """Makes a group of as many shard actors as the configuration has ranks.

    config: resolved. launch: starts the n-th actor. timeout_s: for all of it, from the actors' start to their first
    wait for a plan; the weights are loaded in it. Raises what a rank says of the configuration or the model
    (ConfigError, ModelError), else ShardGroupError. All actors have been ended then.
    """
    builder = _Builder(config, home, timeout_s)
    try:
        return builder.build(launch)
    except BaseException:
        builder.undo()
        raise


class _Builder:
    """A group that is half made."""

    def __init__(self, config: EngineConfig, home: Home, timeout_s: float) -> None:
        self._config, self._home = config, home
        self._shards: list[ShardHandle] = []  # as they were launched; by rank once they have their seats
        self._seats: list[Seat] = []
        self._server: StepChannelServer | None = None
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s

    def build(self, launch: Callable[[int], ShardHandle]) -> ShardGroup:
        begin = time.monotonic()
        for index in range(self._config.parallel.world_size):
            self._shards.append(launch(index))
        self._take_seats()
        store = self._all("open the store", "open_store", [(self._meeting_host(),)])[0]
        self._all("join the group", "join", [(store, self._left())] * len(self._seats))
        blocks = self._all("load the model", "load", [()] * len(self._seats))
        if len(set(blocks)) != 1:
            raise ShardGroupError(f"the ranks have not agreed on their number of KV blocks: {blocks}")
        server, runs = self._connect()
        where = ", ".join(_name(self._seats, rank) for rank in range(len(self._seats)))
        logger.info("a shard group is ready after %.1f s: %s", time.monotonic() - begin, where)
        return ShardGroup(GroupExecutor(server, blocks[0]), self._shards, self._seats, runs)

    def undo(self) -> None:
        if self._server is not None:
            self._server.close()
        _kill(self._shards)

    def _take_seats(self) -> None:
        parallel = self._config.parallel
        places: list[Place] = self._all("start", "place", [()] * len(self._shards))
        self._seats = seat(places, parallel, self._home.node_id)
        self._shards = [self._shards[taken.actor] for taken in self._seats]
        for rank, taken in enumerate(self._seats):
            self._shards[rank].seated(rank, taken.place)
            if self._config.device == "cuda" and len(taken.place.gpus) != 1:
                raise ShardGroupError(
                    f"{_name(self._seats, rank)} has been given {len(taken.place.gpus)} GPUs ({taken.place.gpus}); "
                    "every rank needs exactly one: put GPU: 1 into each bundle but the first"
                )
        for stage in spread_stages(self._seats, parallel):
            logger.warning(
                "the %d tensor-parallel ranks of stage %d lie on several nodes, which makes every layer wait for the "
                "network; use the placement strategy STRICT_PACK, or a smaller tensor_parallel_size with more stages",
                parallel.tensor_parallel_size,
                stage,
            )
        seats = enumerate(self._seats)
        self._all("prepare", "take_seat", [(self._config, rank, s.local_rank, s.visible_gpus) for rank, s in seats])

    def _meeting_host(self) -> str:
        """Where rank 0's store listens: no further than its ranks are."""
        return "127.0.0.1" if len({s.place.node_id for s in self._seats}) == 1 else self._seats[0].place.host

    def _connect(self) -> tuple[StepChannelServer, list[Future[Any]]]:
        """Opens the step channel and lets the ranks run plans; their calls are the run references."""
        parallel, token = self._config.parallel, secrets.token_bytes(_TOKEN_BYTES)
        remote = any(s.place.node_id != self._home.node_id for s in self._seats)
        self._server = server = StepChannelServer(
            parallel.world_size,
            token,
            result_rank=(parallel.pipeline_parallel_size - 1) * parallel.tensor_parallel_size,
            host=self._home.host if remote else None,
        )

        def address(place: Place) -> Address | None:
            return server.path if place.node_id == self._home.node_id else server.address

        calls = zip(self._shards, self._seats, strict=True)
        runs = [shard.call("serve", address(taken.place), token) for shard, taken in calls]
        with ThreadPoolExecutor(1) as pool:
            accepting = pool.submit(server.accept, self._left())
            wait([accepting, *runs], return_when=FIRST_COMPLETED)
            if any(run.done() for run in runs):
                server.close()  # nobody need wait for the others
            try:
                accepting.result()
            except ChannelClosed as error:
                raise ShardGroupError(f"the shard group could not connect: {_ended(self._seats, runs)}") from error
            except EngineError as error:
                raise ShardGroupError(f"the shard group could not connect: {error}") from error
        return server, runs

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())

    def _all(self, what: str, method: str, arguments: list[tuple[object, ...]]) -> list[Any]:
        """Calls a method of the first `len(arguments)` shards and waits for all answers. Raises as the builder does."""
        calls = [shard.call(method, *args) for shard, args in zip(self._shards, arguments, strict=False)]
        _, unanswered = wait(calls, self._left(), return_when=FIRST_EXCEPTION)
        if any(call.done() and call.exception() for call in calls):
            wait(calls, _LAST_WORDS_SECONDS)  # one rank's end makes others fail, and may be known later than theirs
            raise _failure(f"the shard group could not {what}", self._seats, calls)
        if unanswered:
            silent = ", ".join(_name(self._seats, rank) for rank, call in enumerate(calls) if not call.done())
            raise ShardGroupError(
                f"the shard group could not {what} within {self._timeout_s:g} s of its start; no answer from {silent}. "
                "Look at that process's log, or raise group_start_timeout"
            )
        return [call.result() for call in calls]


def _kill(shards: Sequence[ShardHandle]) -> None:
    for shard in shards:
        try:
            shard.kill()
        except Exception as error:  # the others must go all the same
            logger.warning("a shard actor could not be ended: %s", error)


def _failure(what: str, seats: Sequence[Seat], calls: Sequence[Future[Any]]) -> ServingError:
    """The error of calls of which some failed: the class of one that was raised on purpose, the words of all."""
    failed = [(rank, error) for rank, call in enumerate(calls) if call.done() and (error := call.exception())]
    meant = next((error for _, error in failed if isinstance(error, ConfigError | ModelError)), None)
    kind = ShardGroupError if meant is None else ConfigError if isinstance(meant, ConfigError) else ModelError
    # What a rank says on purpose stands before what befell it, mostly because of another's end.
    failed.sort(key=lambda one: not isinstance(one[1], ServingError))
    made = kind(f"{what}: " + "; ".join(f"{_name(seats, rank)}: {_words(error)}" for rank, error in failed))
    made.__cause__ = failed[0][1]
    return made


def _ended(seats: Sequence[Seat], runs: Sequence[Future[Any]]) -> str:
    """The ranks that run no plans any more, and why."""
    ended = [
        f"{_name(seats, rank)}: {_words(error) if (error := run.exception()) else 'it has left'}"
        for rank, run in enumerate(runs)
        if run.done()
    ]
    return "; ".join(ended)


def _name(seats: Sequence[Seat], rank: int) -> str:
    if not seats:
        return f"the actor of bundle {rank + 1}"
    place = seats[rank].place
    gpus = f", GPU {', '.join(place.gpus)}" if place.gpus else ""
    return f"rank {rank} of {len(seats)} (node {place.host}, process {place.pid}{gpus})"


def _words(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, ServingError):
        return error.message
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
