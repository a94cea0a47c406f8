"""Tells a step that hangs from one that is slow."""

from __future__ import annotations

from collections import deque
from threading import Lock

FLOOR = {"cuda": 5.0, "cpu": 60.0}  # seconds; on CPU a chunk of prompt may take long
STOPPED = 5.0  # seconds that a step may wait for a rank whose process can be seen to be stopped
_TIMES_P99 = 20.0
_MEMORY = 1000  # steps
_WARM_UP_STEPS = 20
_WARM_UP_FLOOR = 120.0  # seconds: first steps load kernels and fill caches


class StepWatchdog:
    """A step is stuck when it takes longer than `floor` seconds and 20 times the 99th percentile of those before it.

    The first steps are given more time.
    """

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self._durations: deque[float] = deque(maxlen=_MEMORY)
        self._lock = Lock()  # steps end in the engine's thread, and are judged in the event loop's

    def step_ended(self, seconds: float) -> None:
        with self._lock:
            self._durations.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds after which a step counts as stuck."""
        with self._lock:
            durations = sorted(self._durations)
        if len(durations) < _WARM_UP_STEPS:
            return max(self._floor, _WARM_UP_FLOOR)
        return max(self._floor, _TIMES_P99 * durations[int(0.99 * (len(durations) - 1))])
