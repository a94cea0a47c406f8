"""An executor whose shards are ranks in other processes, behind a step channel."""

from __future__ import annotations

from .plan import StepPlan, StepResult
from .step_channel import StepChannelServer


class GroupExecutor:
    """Runs plans on the ranks that `server` has accepted; implements `Executor`.

    A rank that fails or is gone makes `submit` or `result` raise EngineError; the group is of no use then.
    """

    def __init__(self, server: StepChannelServer, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._server = server

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every rank; returns at once."""
        self._server.submit(plan)

    def result(self) -> StepResult:
        """The result of the oldest plan not yet answered."""
        return self._server.result()

    def shutdown(self) -> None:
        """Tell the ranks that there are no more plans: they leave by themselves. Idempotent; from any thread."""
        self._server.close()
