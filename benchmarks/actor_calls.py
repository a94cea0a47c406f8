"""Step control by plain Ray actor calls: the baseline of the step channel, also compared in a test.

Not used for serving: a call takes Ray some 800 us, a frame 30.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from shoal.replicas.errors import EngineError
from shoal.replicas.plan import StepPlan, StepResult


class ActorCalls:
    """Plans are arguments of `run` on each rank's actor, results its answers; implements `Executor`."""

    def __init__(self, ranks: Sequence[Any], *, result_rank: int = 0, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self._ranks, self._result_rank = tuple(ranks), result_rank
        self._answers: deque[Any] = deque()

    def submit(self, plan: StepPlan) -> None:
        answers = [rank.run.remote(plan) for rank in self._ranks]
        self._answers.append(answers[self._result_rank])

    def result(self) -> StepResult:
        try:
            return ray.get(self._answers.popleft())
        except RayError as error:
            raise EngineError(f"a step failed on rank {self._result_rank}: {error}") from error

    def shutdown(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
