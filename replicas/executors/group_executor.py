"""An executor whose ranks are other processes, behind a step channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from ..channel.step_channel import StepChannelServer
from ..errors import EngineError, ServingError, ShardGroupError
from ..plan import StepPlan, StepResult
from .group_start import Loaded, RankHandle, ended
from .step_watchdog import StepWatchdog

_REASON_SECONDS = 1.0  # to wait for a lost rank's exit status


class GroupExecutor:
    """Runs plans on connected ranks; implements `Executor`.

    If a rank fails or ends, `submit` or `result` raises EngineError and the group is unusable;
    `watch` reports it while no step runs. Subclasses start the processes, and end them in
    `shutdown`.

    runs: a future per rank, done when it stops running plans. watchdog: None if another thread
    checks for stuck steps.
    """

    def __init__(
        self,
        loaded: Loaded,
        server: StepChannelServer,
        ranks: Sequence[RankHandle],
        runs: Sequence[Future[Any]],
        watchdog: StepWatchdog | None = None,
    ) -> None:
        self.num_blocks, self.startup_seconds = loaded
        self.runs = tuple(runs)
        self.failed = False  # remaining ranks may then wait forever for a lost one
        self._server = server
        self._ranks = tuple(ranks)
        self._leaving = threading.Event()
        self._watchdog = watchdog
        self._waits_since = 0.0

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every rank without blocking. Raises EngineError if a rank is gone."""
        self._waits_since = time.monotonic()
        try:
            self._server.submit(plan, self._check_step)
        except EngineError as error:
            raise self._with_reason(error) from error

    def result(self) -> StepResult:
        """The oldest pending result. Raises EngineError if the step fails or is stuck, or a rank is gone."""
        self._waits_since = begin = time.monotonic()
        try:
            result = self._server.result(self._check_step)
        except EngineError as error:
            raise self._with_reason(error) from error
        if self._watchdog is not None:
            self._watchdog.step_ended(time.monotonic() - begin)
        return result

    def stopped(self) -> list[str]:
        return [str(rank) for rank in self._ranks if rank.is_stopped()]

    def watch(self, on_lost: Callable[[ServingError], None]) -> None:
        """Call `on_lost` once, from a new thread, if a rank ends before `shutdown`."""

        def wait_for_one() -> None:
            wait(self.runs, return_when=FIRST_COMPLETED)
            if not self._leaving.is_set():
                on_lost(ShardGroupError(f"the group has lost {ended(self._ranks, self.runs)}"))

        threading.Thread(target=wait_for_one, name="shoal-ranks", daemon=True).start()

    def shutdown(self) -> None:
        """Close the step channel, so that ranks exit. Idempotent and thread-safe."""
        self._leaving.set()
        self._server.close()

    def _check_step(self) -> None:
        if self._watchdog is not None:
            self._watchdog.check(time.monotonic() - self._waits_since, self.stopped)

    def _with_reason(self, error: EngineError) -> EngineError:
        self.failed = True
        if not self._leaving.is_set():
            wait(self.runs, _REASON_SECONDS, return_when=FIRST_COMPLETED)
        ends = ended(self._ranks, self.runs)
        return type(error)(f"{error.message}; {ends}") if ends else error
