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

_REASON_SECONDS = 1.0  # after the channel has lost a rank, for its process's end to be known


class GroupExecutor:
    """Runs plans on ranks that have loaded their model and are connected; implements `Executor`.

    A rank that fails or is gone makes `submit` or `result` raise EngineError, and the group is of no use then. While
    there is nothing to run, `watch` tells of it. Whoever has started the processes says in a subclass how they end.
    runs: futures, each done when its rank runs no plans any more. watchdog: ends a wait for a step that is stuck; None
    where another thread sees to that.
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
        self.failed = False  # ranks that are left may then wait for ever for one that is gone
        self._server = server
        self._ranks = tuple(ranks)
        self._leaving = threading.Event()
        self._watchdog = watchdog
        self._waits_since = 0.0  # time.monotonic()

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every rank; returns at once. Raises EngineError when one is gone."""
        self._waits_since = time.monotonic()
        try:
            self._server.submit(plan, self._look)
        except EngineError as error:
            raise self._explained(error) from error

    def result(self) -> StepResult:
        """The result of the oldest plan not yet answered.

        Raises EngineError if the step fails or is stuck, or a rank is gone.
        """
        self._waits_since = begin = time.monotonic()
        try:
            result = self._server.result(self._look)
        except EngineError as error:
            raise self._explained(error) from error
        if self._watchdog is not None:
            self._watchdog.step_ended(time.monotonic() - begin)
        return result

    def stopped(self) -> list[str]:
        """The ranks whose processes are stopped, as far as that can be seen."""
        return [str(rank) for rank in self._ranks if rank.is_stopped()]

    def watch(self, on_lost: Callable[[ServingError], None]) -> None:
        """Calls `on_lost` once, from a thread of its own, if a rank ends before `shutdown`."""

        def wait_for_one() -> None:
            wait(self.runs, return_when=FIRST_COMPLETED)
            if not self._leaving.is_set():
                on_lost(ShardGroupError(f"the group has lost {ended(self._ranks, self.runs)}"))

        threading.Thread(target=wait_for_one, name="shoal-ranks", daemon=True).start()

    def shutdown(self) -> None:
        """Tell the ranks that there are no more plans: they leave by themselves. Idempotent; from any thread."""
        self._leaving.set()
        self._server.close()

    def _look(self) -> None:
        """Raises EngineError if the step that is waited for is stuck."""
        if self._watchdog is not None:
            self._watchdog.check(time.monotonic() - self._waits_since, self.stopped)

    def _explained(self, error: EngineError) -> EngineError:
        """The error, and whose process has ended: the channel knows no more than that a rank hung up."""
        self.failed = True
        if not self._leaving.is_set():
            wait(self.runs, _REASON_SECONDS, return_when=FIRST_COMPLETED)
        ends = ended(self._ranks, self.runs)
        return type(error)(f"{error.message}; {ends}") if ends else error
