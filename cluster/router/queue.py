"""The router's admission queue and batching window."""

from __future__ import annotations

import heapq
from typing import Generic, Protocol, TypeVar

from ..wire.errors import QueueFull

MIN_RETRY_AFTER = 1.0  # seconds
MAX_RETRY_AFTER = 30.0
_RATE_MEMORY = 5.0  # seconds of the moving average


class Queued(Protocol):
    """An item of the queue; constant while queued."""

    @property
    def priority(self) -> int:
        """Lower goes first."""
        ...

    @property
    def arrival(self) -> int:
        """Breaks ties of priority."""
        ...

    @property
    def num_tokens(self) -> int:
        """Context tokens."""
        ...


T = TypeVar("T", bound=Queued)


class AdmissionQueue(Generic[T]):
    """Bounded queue by (priority, arrival), with removal in O(1) on average."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._heap: list[tuple[int, int, int, T]] = []  # the third is unique
        self._queued: dict[int, T] = {}  # by id(item)
        self._serial = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._queued)

    def push(self, item: T, *, retry_after: float) -> None:
        """Queue the item, or raise QueueFull. An empty queue accepts any size."""
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
        """Queue an item accepted earlier; the bounds do not apply."""
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
        """Remove the item from any position; False if it is not queued."""
        if self._queued.pop(id(item), None) is None:
            return False
        self.num_tokens -= item.num_tokens
        if len(self._heap) > 2 * len(self._queued) + 64:  # removed items keep their prompts alive
            self._heap = [entry for entry in self._heap if id(entry[3]) in self._queued]
            heapq.heapify(self._heap)
        return True


class BatchWindow:
    """Times dispatches so that requests which arrive together share a prefill step.

    An idle router dispatches at once and opens a window of `seconds`. The end of the window dispatches all
    requests that arrived in it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._opened = float("-inf")

    def delay(self, now: float) -> float:
        """Seconds from `now` until the next dispatch may happen."""
        return max(0.0, self._opened + self._seconds - now)

    def open(self, now: float) -> None:
        """Record a dispatch."""
        self._opened = now


class DepartureRate:
    """Moving average of the queue's departure rate, for Retry-After."""

    def __init__(self) -> None:
        self._rate = 0.0  # requests per second
        self._updated = 0.0

    def add(self, count: int, now: float) -> None:
        elapsed = max(now - self._updated, 1e-3)
        weight = min(elapsed / _RATE_MEMORY, 1.0)
        self._rate += weight * (count / elapsed - self._rate)
        self._updated = now

    def retry_after(self, num_queued: int) -> float:
        """Estimated seconds until a queue of that length is empty."""
        if self._rate <= 0.0:
            return MIN_RETRY_AFTER
        return min(max(num_queued / self._rate, MIN_RETRY_AFTER), MAX_RETRY_AFTER)
