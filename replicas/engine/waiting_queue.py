"""Who waits for a place among the running sequences, and who is next."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from .sequence import RequestState, SchedulingKey, Sequence


class WaitingQueue:
    """New requests, and preempted sequences, which keep their rows; both in order of rank."""

    def __init__(self) -> None:
        self._new: list[tuple[SchedulingKey, RequestState]] = []  # a heap; ended requests leave it when they come first
        self._preempted: list[tuple[SchedulingKey, Sequence]] = []  # sorted

    def __bool__(self) -> bool:
        return bool(self._new or self._preempted)

    def first(self, num_free_rows: int) -> Sequence | None:
        """The first in rank that has its rows or can have them.

        A request that must wait for rows does not hold up those that have theirs: they may be the ones to free them.
        """
        while self._new and not self._new[0][1].num_open:
            heapq.heappop(self._new)
        state = self._new[0][1] if self._new else None
        if state is not None and state.request.num_samples > num_free_rows:
            state = None
        if self._preempted and (state is None or self._preempted[0][0] < state.rank):
            return self._preempted[0][1]
        return state.leader if state is not None else None

    def admissible(self, num_free_rows: int) -> Iterator[Sequence]:
        """Those that have rows, and leaders of new requests as long as rows are left for them, in about this order."""
        for _, sequence in self._preempted:
            yield sequence
        for _, state in self._new:
            num_free_rows -= state.request.num_samples
            if num_free_rows < 0:
                return
            if state.num_open:
                yield state.leader

    def add(self, state: RequestState) -> None:
        """A new request waits."""
        heapq.heappush(self._new, (state.rank, state))

    def pop(self) -> None:
        """The first of the new requests, which `first` returned, is admitted."""
        heapq.heappop(self._new)

    def add_preempted(self, sequence: Sequence) -> None:
        """A preempted sequence waits to be resumed."""
        insort(self._preempted, (sequence.rank, sequence))

    def remove_preempted(self, sequence: Sequence) -> None:
        """A preempted sequence is resumed, or has ended."""
        self._preempted.remove((sequence.rank, sequence))
