"""The router's admission queue: bounded, by priority and then by arrival, and the window that gathers arrivals."""

from __future__ import annotations

import heapq
from typing import Generic, Protocol, TypeVar

from ..wire.errors import QueueFull

MIN_RETRY_AFTER = 1.0  # seconds
MAX_RETRY_AFTER = 30.0
_RATE_MEMORY = 5.0  # seconds over which the rate of departures is averaged


class Queued(Protocol):
    """An item of the queue. None of this changes while it is queued."""

    @property
    def priority(self) -> int:
        """Lower goes first."""
        ...

    @property
    def arrival(self) -> int:
        """Increases with time; ties of priority go by it."""
        ...

    @property
    def num_tokens(self) -> int:
        """Context tokens that the item holds in memory."""
        ...


T = TypeVar("T", bound=Queued)


class AdmissionQueue(Generic[T]):
    """Items by (priority, arrival), within bounds. Removal from the middle costs no search."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._heap: list[tuple[int, int, int, T]] = []  # the third is unique, so that items are never compared
        self._queued: dict[int, T] = {}  # by id(item)
        self._serial = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._queued)

    def push(self, item: T, *, retry_after: float) -> None:
        """Queues the item, or raises QueueFull. An empty queue takes an item of any size."""
        if self._queued and (
            len(self._queued) >= self._max_requests or self.num_tokens + item.num_tokens > self._max_tokens
        ):
            raise QueueFull(
                f"{len(self._queued)} requests with {self.num_tokens} tokens are queued, and the router takes at most "
                f"{self._max_requests} with {self._max_tokens}; retry in {retry_after:.0f} s",
                retry_after=retry_after,
            )
        self.push_accepted(item)

    def push_accepted(self, item: T) -> None:
        """Queues an item that was accepted before; the bounds do not apply to it."""
        self._serial += 1
        heapq.heappush(self._heap, (item.priority, item.arrival, self._serial, item))
        self._queued[id(item)] = item
        self.num_tokens += item.num_tokens

    def peek(self) -> T | None:
        """The first item, or None."""
        while self._heap:
            item = self._heap[0][3]
            if id(item) in self._queued:
                return item
            heapq.heappop(self._heap)
        return None

    def remove(self, item: T) -> bool:
        """Takes the item out, wherever it stands; False when it is not queued."""
        if self._queued.pop(id(item), None) is None:
            return False
        self.num_tokens -= item.num_tokens
        if len(self._heap) > 2 * len(self._queued) + 64:  # removed items still hold their prompts
            self._heap = [entry for entry in self._heap if id(entry[3]) in self._queued]
            heapq.heapify(self._heap)
        return True


class BatchWindow:
    """When queued requests are dispatched, so that those which arrive together are prefilled in one step.

    The first request of a quiet router goes at once and opens a window; what arrives in the window goes together
    when it ends. At most one dispatch happens per `seconds`, and none waits longer.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._opened = float("-inf")

    def delay(self, now: float) -> float:
        """Seconds from `now` until the next dispatch may happen."""
        return max(0.0, self._opened + self._seconds - now)

    def open(self, now: float) -> None:
        """A dispatch happened."""
        self._opened = now


class DepartureRate:
    """How fast requests leave the queue, for an honest Retry-After: an average over the last few seconds."""

    def __init__(self) -> None:
        self._rate = 0.0  # requests per second
        self._updated = 0.0

    def add(self, count: int, now: float) -> None:
        elapsed = max(now - self._updated, 1e-3)
        weight = min(elapsed / _RATE_MEMORY, 1.0)
        self._rate += weight * (count / elapsed - self._rate)
        self._updated = now

    def retry_after(self, num_queued: int) -> float:
        """Seconds until a queue of that length is probably gone."""
        if self._rate <= 0.0:
            return MIN_RETRY_AFTER
        return min(max(num_queued / self._rate, MIN_RETRY_AFTER), MAX_RETRY_AFTER)
