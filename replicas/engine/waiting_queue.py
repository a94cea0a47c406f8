"""The queue of sequences that wait for blocks."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from .sequence import RequestState, SchedulingKey, Sequence


class WaitingQueue:
    """New requests, and preempted sequences, which keep their rows; both by scheduling key."""

    def __init__(self) -> None:
        self._new: list[tuple[SchedulingKey, RequestState]] = []  # ended requests are dropped when first
        self._preempted: list[tuple[SchedulingKey, Sequence]] = []  # sorted

    def __bool__(self) -> bool:
        return bool(self._new or self._preempted)

    def first(self, num_free_rows: int) -> Sequence | None:
        """The sequence with the lowest key that has rows or can have them.

        A request that waits for rows blocks none that have theirs and may free them.
        """
        while self._new and not self._new[0][1].num_open:
            heapq.heappop(self._new)
        state = self._new[0][1] if self._new else None
        if state is not None and state.request.num_samples > num_free_rows:
            state = None
        if self._preempted and (state is None or self._preempted[0][0] < state.key):
            return self._preempted[0][1]
        return state.leader if state is not None else None

    def admissible(self, num_free_rows: int) -> Iterator[Sequence]:
        """Sequences with rows, then leaders of new requests while rows are left, in about this order."""
        for _, sequence in self._preempted:
            yield sequence
        for _, state in self._new:
            num_free_rows -= state.request.num_samples
            if num_free_rows < 0:
                return
            if state.num_open:
                yield state.leader

    def add(self, state: RequestState) -> None:
        """Add a new request."""
        heapq.heappush(self._new, (state.key, state))

    def pop(self) -> None:
        """Remove the new request that `first` returned."""
        heapq.heappop(self._new)

    def add_preempted(self, sequence: Sequence) -> None:
        """Add a preempted sequence."""
        insort(self._preempted, (sequence.key, sequence))

    def remove_preempted(self, sequence: Sequence) -> None:
        """Remove one that resumes or has ended."""
        self._preempted.remove((sequence.key, sequence))
