"""The executor of a model copy that is one shard: it runs in this process, in a thread of its own."""

from __future__ import annotations

import queue
import threading

from .config import EngineConfig
from .errors import EngineError
from .plan import StepPlan, StepResult
from .shard import Shard


class LocalExecutor:
    """Runs plans on one local shard; implements `Executor`.

    config: resolved. Loading happens here, in the constructor, and raises what Shard raises.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._shard = Shard(config)
        self.num_blocks = self._shard.num_blocks
        self._plans: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[StepResult | EngineError] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="shoal-shard", daemon=True)
        self._thread.start()

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan; returns at once."""
        self._plans.put(plan)

    def result(self) -> StepResult:
        """The result of the oldest plan not yet answered; blocks. Raises EngineError if that step failed."""
        result = self._results.get()
        if isinstance(result, EngineError):
            raise result
        return result

    def shutdown(self) -> None:
        """Finish the plans in flight and end the thread."""
        self._plans.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (plan := self._plans.get()) is not None:
            try:
                self._results.put(self._shard.run(plan))
            except Exception as error:
                failure = EngineError(f"step {plan.step} failed: {type(error).__name__}: {error}")
                failure.__cause__ = error
                self._results.put(failure)
