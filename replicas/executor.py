"""The interface between an engine and the shards that run its plans."""

from __future__ import annotations

from typing import Protocol

from .plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs step plans in order on one copy of the model, two or more in flight.

    `submit` returns at once; `result` blocks for the oldest plan's result. Either raises
    EngineError for a plan that fails.
    """

    num_blocks: int  # KV blocks of the shards

    def submit(self, plan: StepPlan) -> None: ...

    def result(self) -> StepResult: ...

    def shutdown(self) -> None: ...
