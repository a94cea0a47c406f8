"""Starts a group of ranks, all or none, whose processes already run."""

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

_ROOT_CAUSE_SECONDS = 2.0  # grace period, so that the root cause is reported
_POLL_SECONDS = 1.0  # between checks for stopped ranks
_STOPPED_POLLS = 5  # checks in a row before a stopped rank fails the start
_TOKEN_BYTES = 32


class RankHandle(Protocol):
    """Control of a rank's process; `str` names the rank, node and process."""

    def call(self, method: str, *arguments: object) -> Future[Any]:
        """Call a method of ShardRank. The future fails with its exception, or if the process ends."""
        ...

    def is_stopped(self) -> bool:
        """Whether its process is on this node and stopped; does not block."""
        ...


class Loaded(NamedTuple):
    """A rank's report after loading."""

    num_blocks: int  # per rank
    startup_seconds: dict[str, float]  # by stage


class GroupStart:
    """Steps before the first plan; one rank's failure fails the start.

    timeout_s: total. Methods raise ConfigError or ModelError if a rank did, else
    ShardGroupError, naming the rank. The caller then ends the processes.
    """

    def __init__(self, config: ResolvedConfig, timeout_s: float) -> None:
        self._config = config
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s

    def load(self, ranks: Sequence[RankHandle], meeting_host: str) -> Loaded:
        """Form the process group and load the model; returns rank 0's report. meeting_host: rank 0's address."""
        store = self.call_all("open the store", ranks[:1], "open_store", meeting_host)[0]
        left = self._left()
        # Ranks time out before the group, and name the ranks they waited for.
        self.call_all("form the process group", ranks, "join", store, max(left - _ROOT_CAUSE_SECONDS, left / 2))
        loaded: list[Loaded] = self.call_all("load the model", ranks, "load")
        blocks = [one.num_blocks for one in loaded]
        if len(set(blocks)) != 1:
            raise ShardGroupError(f"the ranks differ in their number of KV blocks: {blocks}")
        return loaded[0]

    def connect(
        self, ranks: Sequence[RankHandle], elsewhere: Sequence[bool], host: str
    ) -> tuple[StepChannelServer, list[Future[Any]]]:
        """Connect the ranks to a step channel; returns it and a future per rank, done when
        the rank is gone.

        elsewhere: ranks on other nodes, which connect by TCP to this node's address `host`.
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
        pool.shutdown(wait=False)  # do not delay an interrupt; closing the server ends it
        for seconds in self._poll("connect", ranks):
            if wait([accepting, *runs], seconds, return_when=FIRST_COMPLETED).done:
                break
        if lost := any(run.done() for run in runs):
            server.close()
        try:
            accepting.result()
        except ChannelClosed:
            pass  # raised above
        except EngineError as error:
            raise ShardGroupError(f"the ranks could not connect: {error}") from error
        if lost:  # possibly the last rank, after it was accepted
            raise ShardGroupError(f"the ranks could not connect: {ended(ranks, runs)}")

    def call_all(self, what: str, ranks: Sequence[RankHandle], method: str, *arguments: object) -> list[Any]:
        """Every rank's answer to one call. what: names the step in errors."""
        return self.call_each(what, ranks, method, [arguments] * len(ranks))

    def call_each(
        self, what: str, ranks: Sequence[RankHandle], method: str, arguments: Sequence[tuple[object, ...]]
    ) -> list[Any]:
        calls = [rank.call(method, *own) for rank, own in zip(ranks, arguments, strict=True)]
        silent = set(calls)
        for seconds in self._poll(what, ranks):
            silent = wait(calls, seconds, return_when=FIRST_EXCEPTION).not_done
            if any(call.done() and call.exception() for call in calls):
                wait(calls, _ROOT_CAUSE_SECONDS)
                raise _failure(what, ranks, calls)
            if not silent:
                return [call.result() for call in calls]
        names = ", ".join(str(rank) for rank, call in zip(ranks, calls, strict=True) if call in silent)
        raise ShardGroupError(
            f"the ranks could not {what} within {self._timeout_s:g} s of the group's start: no answer from {names}. "
            "Look at its log, or give the group more time to start (group_start_timeout_s)"
        )

    def _poll(self, what: str, ranks: Sequence[RankHandle]) -> Iterator[float]:
        """Yield seconds until the next check. Raises ShardGroupError at the timeout, or if a rank stays stopped."""
        num_stopped = [0] * len(ranks)
        left = self._left()
        while True:
            yield min(left, _POLL_SECONDS)
            if left <= _POLL_SECONDS:
                return
            num_stopped = [num + 1 if rank.is_stopped() else 0 for rank, num in zip(ranks, num_stopped, strict=True)]
            names = [str(rank) for rank, num in zip(ranks, num_stopped, strict=True) if num == _STOPPED_POLLS]
            if names:
                raise ShardGroupError(
                    f"the ranks could not {what}: stopped (as by SIGSTOP) for {_STOPPED_POLLS * _POLL_SECONDS:g} s: "
                    f"{', '.join(names)}; do not stop a group's processes while it starts"
                )
            left = self._left()

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())


def ended(ranks: Sequence[RankHandle], runs: Sequence[Future[Any]]) -> str:
    """Ranks whose runs are done, with the reason."""
    failed = [(rank, run.exception()) for rank, run in zip(ranks, runs, strict=True) if run.done()]
    # List errors that a rank raised before lost connections, which usually follow from another's
    # end.
    failed.sort(key=lambda one: not isinstance(one[1], ServingError))
    return "; ".join(f"{rank}: {'it exited' if error is None else _one_line(error)}" for rank, error in failed)


def _failure(what: str, ranks: Sequence[RankHandle], calls: Sequence[Future[Any]]) -> ServingError:
    failed = {rank: call for rank, call in zip(ranks, calls, strict=True) if call.done() and call.exception()}
    errors = [call.exception() for call in failed.values()]
    kind = next((type(error) for error in errors if isinstance(error, ConfigError | ModelError)), ShardGroupError)
    made = kind(f"the ranks could not {what}: {ended(list(failed), list(failed.values()))}")
    made.__cause__ = errors[0]
    return made


def _one_line(error: BaseException) -> str:
    if isinstance(error, ServingError):
        return error.message
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
