"""The seam between an engine and the shards that run its plans."""

from __future__ import annotations

from typing import Protocol

from .plan import StepPlan, StepResult


class Executor(Protocol):
    """Runs step plans in order on one copy of the model.

    `submit` returns at once; `result` blocks until the oldest submitted plan is done and returns its result. Two or
    more plans may be in flight. A plan that cannot be run makes `submit` or its `result` raise EngineError.
    """

    num_blocks: int  # KV blocks that the shards have room for

    def submit(self, plan: StepPlan) -> None: ...

    def result(self) -> StepResult: ...

    def shutdown(self) -> None: ...
