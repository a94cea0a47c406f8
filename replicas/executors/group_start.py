"""How the ranks of a model copy become a group, whoever has started their processes: all of them, or none."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, Protocol

from ..channel.step_channel import StepChannelServer
from ..channel.step_sockets import Address, ChannelClosed
from ..config import ResolvedConfig
from ..errors import ConfigError, EngineError, ModelError, ServingError, ShardGroupError

_LAST_WORDS_SECONDS = 2.0  # after one rank has failed, for the one that made it fail to be known
_LOOK_SECONDS = 1.0  # between two looks for ranks that are stopped
_STOPPED_LOOKS = 5  # in a row, after which nobody is waited for who may be stopped for good
_TOKEN_BYTES = 32


class RankHandle(Protocol):
    """A rank's process, as its group drives it; `str` names the rank, where it is, and its process."""

    def call(self, method: str, *arguments: object) -> Future[Any]:
        """Calls a method of ShardRank. The future fails with what it raises, or when the process ends."""
        ...

    def is_stopped(self) -> bool:
        """Whether its process is on this node and stopped, as by SIGSTOP; a mere look at it."""
        ...


class Loaded(NamedTuple):
    """What a rank says when it has loaded its part of the model."""

    num_blocks: int  # KV blocks that every rank has room for
    startup_seconds: dict[str, float]  # what each stage of it took


class GroupStart:
    """The steps before the first plan. Every rank takes each of them; one that fails on one rank fails for all.

    config: resolved. timeout_s: for all steps together. Every method raises what a rank says of the configuration or
    the model (ConfigError, ModelError), else ShardGroupError, and names the rank. The processes are the caller's to
    end then.
    """

    def __init__(self, config: ResolvedConfig, timeout_s: float) -> None:
        self._config = config
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s

    def load(self, ranks: Sequence[RankHandle], meeting_host: str) -> Loaded:
        """Lets the ranks meet and load the model; what rank 0 says of it. meeting_host: an address of that."""
        store = self.call_all("open the store", ranks[:1], "open_store", meeting_host)[0]
        left = self._left()
        # A rank that gives up before the group does says for whom it has waited.
        self.call_all("meet", ranks, "join", store, max(left - _LAST_WORDS_SECONDS, left / 2))
        loaded: list[Loaded] = self.call_all("load the model", ranks, "load")
        blocks = [one.num_blocks for one in loaded]
        if len(set(blocks)) != 1:
            raise ShardGroupError(f"the ranks have not agreed on their number of KV blocks: {blocks}")
        return loaded[0]

    def connect(
        self, ranks: Sequence[RankHandle], elsewhere: Sequence[bool], host: str
    ) -> tuple[StepChannelServer, list[Future[Any]]]:
        """Lets the ranks run the plans of a step channel; returns it, and their runs, each done when its rank is gone.

        elsewhere: which ranks are not on this node; they come by TCP, to this node's address `host`.
        """
        parallel, token = self._config.parallel, secrets.token_bytes(_TOKEN_BYTES)
        server = StepChannelServer(
            parallel.world_size,
            token,
            result_rank=(parallel.pipeline_parallel_size - 1) * parallel.tensor_parallel_size,
            host=host if any(elsewhere) else None,
        )
        try:
            addresses: list[Address | None] = [server.address if away else server.path for away in elsewhere]
            runs = [rank.call("serve", address, token) for rank, address in zip(ranks, addresses, strict=True)]
            self._accept(server, ranks, runs)
        except BaseException:
            server.close()
            raise
        return server, runs

    def _accept(self, server: StepChannelServer, ranks: Sequence[RankHandle], runs: Sequence[Future[Any]]) -> None:
        pool = ThreadPoolExecutor(1)
        accepting = pool.submit(server.accept, self._left())
        pool.shutdown(wait=False)  # an interrupt is not held up by it; closing the server ends it
        for seconds in self._poll("connect", ranks):
            if wait([accepting, *runs], seconds, return_when=FIRST_COMPLETED).done:
                break
        if lost := any(run.done() for run in runs):
            server.close()  # nobody need wait for the others
        try:
            accepting.result()
        except ChannelClosed:
            pass  # by the line above
        except EngineError as error:
            raise ShardGroupError(f"the ranks could not connect: {error}") from error
        if lost:  # perhaps after it had been accepted, as the last one
            raise ShardGroupError(f"the ranks could not connect: {ended(ranks, runs)}")

    def call_all(self, what: str, ranks: Sequence[RankHandle], method: str, *arguments: object) -> list[Any]:
        """Every rank's answer to the same call. what: what cannot be done if it fails."""
        return self.call_each(what, ranks, method, [arguments] * len(ranks))

    def call_each(
        self, what: str, ranks: Sequence[RankHandle], method: str, arguments: Sequence[tuple[object, ...]]
    ) -> list[Any]:
        """Every rank's answer to a call with arguments of its own."""
        calls = [rank.call(method, *own) for rank, own in zip(ranks, arguments, strict=True)]
        silent = set(calls)
        for seconds in self._poll(what, ranks):
            silent = wait(calls, seconds, return_when=FIRST_EXCEPTION).not_done
            if any(call.done() and call.exception() for call in calls):
                wait(calls, _LAST_WORDS_SECONDS)
                raise _failure(what, ranks, calls)
            if not silent:
                return [call.result() for call in calls]
        names = ", ".join(str(rank) for rank, call in zip(ranks, calls, strict=True) if call in silent)
        raise ShardGroupError(
            f"the ranks could not {what} within {self._timeout_s:g} s of the group's start: no answer from {names}. "
            "Look at its log, or give the group more time to start (group_start_timeout_s)"
        )

    def _poll(self, what: str, ranks: Sequence[RankHandle]) -> Iterator[float]:
        """For how long to wait before the ranks are looked at again, until the time for the start is over.

        Raises ShardGroupError where one has been stopped at several looks in a row: it would take all of that time.
        """
        num_stopped = [0] * len(ranks)
        left = self._left()
        while True:
            yield min(left, _LOOK_SECONDS)
            if left <= _LOOK_SECONDS:
                return
            num_stopped = [num + 1 if rank.is_stopped() else 0 for rank, num in zip(ranks, num_stopped, strict=True)]
            names = [str(rank) for rank, num in zip(ranks, num_stopped, strict=True) if num == _STOPPED_LOOKS]
            if names:
                raise ShardGroupError(
                    f"the ranks could not {what}: stopped (as by SIGSTOP) for {_STOPPED_LOOKS * _LOOK_SECONDS:g} s: "
                    f"{', '.join(names)}; let nothing stop a group's processes while it starts"
                )
            left = self._left()

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())


def ended(ranks: Sequence[RankHandle], runs: Sequence[Future[Any]]) -> str:
    """The ranks whose runs are done, and why."""
    failed = [(rank, run.exception()) for rank, run in zip(ranks, runs, strict=True) if run.done()]
    # What a rank says on purpose stands before what befell it, mostly because of another's end.
    failed.sort(key=lambda one: not isinstance(one[1], ServingError))
    return "; ".join(f"{rank}: {'it has left' if error is None else _words(error)}" for rank, error in failed)


def _failure(what: str, ranks: Sequence[RankHandle], calls: Sequence[Future[Any]]) -> ServingError:
    """The error of calls of which some failed: the class of what was said of configuration or model, words of all."""
    failed = {rank: call for rank, call in zip(ranks, calls, strict=True) if call.done() and call.exception()}
    errors = [call.exception() for call in failed.values()]
    kind = next((type(error) for error in errors if isinstance(error, ConfigError | ModelError)), ShardGroupError)
    made = kind(f"the ranks could not {what}: {ended(list(failed), list(failed.values()))}")
    made.__cause__ = errors[0]
    return made


def _words(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, ServingError):
        return error.message
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
