"""An executor whose shards are ranks in other processes, behind a step channel."""

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

_REASON_SECONDS = 1.0  # after the channel lost a rank, until its process's end is known


class GroupExecutor:
    """Runs plans on ranks that have loaded their model and are connected; implements `Executor`.

    If a rank fails or ends, `submit` or `result` raises EngineError and the group is unusable; while no step runs,
    `watch` reports it. Subclasses start the processes and end them in `shutdown`.
    runs: futures, each done when its rank has stopped running plans.
    watchdog: ends the wait for a stuck step; None if another thread does that.
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
        self.failed = False  # the remaining ranks may then wait forever for a lost one
        self._server = server
        self._ranks = tuple(ranks)
        self._leaving = threading.Event()
        self._watchdog = watchdog
        self._waits_since = 0.0  # time.monotonic()

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every rank; returns at once. Raises EngineError if a rank is gone."""
        self._waits_since = time.monotonic()
        try:
            self._server.submit(plan, self._check_step)
        except EngineError as error:
            raise self._with_reason(error) from error

    def result(self) -> StepResult:
        """The result of the oldest plan not yet answered.

        Raises EngineError if the step fails or is stuck, or a rank is gone.
        """
        self._waits_since = begin = time.monotonic()
        try:
            result = self._server.result(self._check_step)
        except EngineError as error:
            raise self._with_reason(error) from error
        if self._watchdog is not None:
            self._watchdog.step_ended(time.monotonic() - begin)
        return result

    def stopped(self) -> list[str]:
        """The ranks whose processes are visibly stopped."""
        return [str(rank) for rank in self._ranks if rank.is_stopped()]

    def watch(self, on_lost: Callable[[ServingError], None]) -> None:
        """Call `on_lost` once, from a new thread, if a rank ends before `shutdown`."""

        def wait_for_one() -> None:
            wait(self.runs, return_when=FIRST_COMPLETED)
            if not self._leaving.is_set():
                on_lost(ShardGroupError(f"the group has lost {ended(self._ranks, self.runs)}"))

        threading.Thread(target=wait_for_one, name="shoal-ranks", daemon=True).start()

    def shutdown(self) -> None:
        """Close the step channel, so that the ranks exit. Idempotent; from any thread."""
        self._leaving.set()
        self._server.close()

    def _check_step(self) -> None:
        """Raise EngineError if the awaited step is stuck."""
        if self._watchdog is not None:
            self._watchdog.check(time.monotonic() - self._waits_since, self.stopped)

    def _with_reason(self, error: EngineError) -> EngineError:
        """The error, with the ranks whose processes ended: the channel only knows that a rank hung up."""
        self.failed = True
        if not self._leaving.is_set():
            wait(self.runs, _REASON_SECONDS, return_when=FIRST_COMPLETED)
        ends = ended(self._ranks, self.runs)
        return type(error)(f"{error.message}; {ends}") if ends else error
