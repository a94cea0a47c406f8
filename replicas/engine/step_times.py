"""Histogram of an engine's step times."""

from __future__ import annotations

from bisect import bisect_left

from ..protocol import STEP_SECONDS, StepTimes


class StepTimesCounter:
    """Counts since the start. One thread adds, others read; a reader may miss the last step."""

    def __init__(self) -> None:
        self._counts = list(StepTimes().counts)
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(STEP_SECONDS, seconds)] += 1
        self._seconds += seconds

    def snapshot(self) -> StepTimes:
        return StepTimes(tuple(self._counts), self._seconds)
