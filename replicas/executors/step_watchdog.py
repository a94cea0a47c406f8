"""Detects stuck steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from ..config import ResolvedConfig
from ..errors import EngineError

_STOPPED = 5.0  # seconds, for a step that waits for a stopped process
_TIMES_P99 = 20.0
_MEMORY = 1000  # steps
_WARM_UP_STEPS = 20
_WARM_UP_FLOOR = 120.0  # seconds: first steps load kernels and fill caches


class StepWatchdog:
    """A step is stuck after `floor` seconds or 20 times earlier steps' 99th percentile, whichever is longer.

    First steps get more time; steps that wait for a stopped process get less.
    """

    def __init__(self, floor: float) -> None:
        self._floor = floor
        self._durations: deque[float] = deque(maxlen=_MEMORY)
        self._lock = Lock()  # steps end in one thread and are checked in another

    @classmethod
    def of(cls, config: ResolvedConfig) -> StepWatchdog:
        return cls(config.step_limit_s)

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

    def check(self, seconds: float, stopped: Callable[[], list[str]]) -> None:
        """Raise EngineError if a step of that duration is stuck. stopped: returns stopped ranks."""
        limit = self.limit
        if seconds > limit:
            raise EngineError(f"a step has taken {seconds:.1f} s, above the limit of {limit:.1f} s (step_limit_s)")
        if seconds > _STOPPED and (names := stopped()):
            raise EngineError(f"a step has taken {seconds:.1f} s and waits for stopped processes: {', '.join(names)}")


def is_stopped(pid: int) -> bool:
    """Whether a local process is stopped (SIGSTOP); does not block."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended
        return False
    return status.rpartition(")")[2].split()[0] == "T"
