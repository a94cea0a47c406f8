"""State of one request in a router: replay log, pending deltas, queued and in-flight samples."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...replicas.errors import CapacityError, RequestError, ServingError
from ...replicas.protocol import FinishReason, Request, TokenDelta
from .replay import ReplayLog


@dataclass(slots=True)
class RequestTimes:
    """Timestamps of a request in event-loop seconds; None: not yet."""

    arrived: float = 0.0
    dispatched: float | None = None
    first_token: float | None = None
    finished: float | None = None


class RoutedRequest:
    """A request between its replicas and its reader."""

    __slots__ = (
        "_delivered",
        "_error",
        "_max_pending",
        "_pending",
        "_waiter",
        "in_flights",
        "log",
        "queued_samples",
        "times",
    )

    def __init__(self, request: Request, times: RequestTimes, max_pending: int) -> None:
        self.log = ReplayLog(request)
        self.times = times
        self.queued_samples: set[QueuedSample] = set()
        self.in_flights: dict[InFlight, ReplicaConnection] = {}
        self._pending: list[TokenDelta] = []
        self._max_pending = max_pending
        self._delivered = False
        self._error: ServingError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, delta: TokenDelta) -> None:
        self._delivered = True
        self._pending.append(delta)
        self.wake()

    @property
    def overflown(self) -> bool:
        """Whether the reader is too slow."""
        return len(self._pending) > self._max_pending

    def fail(self, samples: range, error: ServingError) -> list[TokenDelta]:
        """End `samples` with `error`; returns their terminal deltas.

        Before the first delta, `next` raises errors that the client can act on. Terminal deltas carry all others.
        """
        if not self._delivered and isinstance(error, RequestError | CapacityError):
            self._error = error
            self.log.finish(samples, FinishReason.ERROR)
            self.wake()
            return []
        deltas = self.log.finish(samples, FinishReason.ERROR, error.message)
        for delta in deltas:
            self.push(delta)
        return deltas

    async def next(self) -> list[TokenDelta]:
        """All deltas since the last call, at least one; empty after the end of all samples."""
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self.log.num_open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pending, self._pending = self._pending, []
        return pending

    def wake(self) -> None:
        """Wake the reader."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(eq=False, slots=True)
class QueuedSample:
    """A request, or the unfinished samples of one, in the admission queue."""

    routed: RoutedRequest
    request: Request
    arrival: int
    num_replays: int = 0  # lost replicas
    deadline: asyncio.TimerHandle | None = None

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.request.emitted_token_ids)

    @property
    def samples(self) -> range:
        return _samples(self.request)


@dataclass(eq=False, slots=True)
class InFlight:
    """A request on a replica."""

    routed: RoutedRequest
    request: Request
    arrival: int
    num_replays: int
    num_open: int  # samples without a terminal delta
    stream: int = 0  # number on the replica's connection

    @property
    def samples(self) -> range:
        return _samples(self.request)


class ReplicaConnection(Protocol):
    """The connection to the replica that runs an in-flight request."""

    def abort(self, in_flights: Sequence[InFlight]) -> None:
        """End all samples of the requests; no further delta arrives."""
        ...

    def abort_sample(self, in_flight: InFlight, sample: int) -> None:
        """End one sample; its terminal delta arrives as any other."""
        ...


def _samples(request: Request) -> range:
    return range(request.first_sample, request.first_sample + request.num_samples)
