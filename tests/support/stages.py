"""The stages of a pipeline in one thread, one after the other: what they hand to each other waits in queues."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from shoal.replicas.config import ResolvedConfig
from shoal.replicas.parallel.comm import ParallelContext
from shoal.replicas.parallel.pipeline import PipelineLinks
from shoal.replicas.plan import StepPlan, StepResult
from shoal.replicas.worker.shard import Shard


class QueuedLinks(PipelineLinks):
    """The links of stage `stage` over queues: one for each stage's hidden states, one for tokens."""

    def __init__(self, stage: int, hidden: list[deque[Tensor]], tokens: deque[Tensor]) -> None:
        self._stage, self.hidden, self.tokens = stage, hidden, tokens

    def send_hidden(self, x: Tensor) -> None:
        self.hidden[self._stage + 1].append(x.clone())

    def receive_hidden(self, out: Tensor) -> None:
        out.copy_(self.hidden[self._stage].popleft())

    def return_tokens(self, tokens: Tensor) -> None:
        self.tokens.append(tokens.clone())

    def receive_tokens(self, out: Tensor) -> None:
        out.copy_(self.tokens.popleft())

    def finish(self) -> None:
        """What is in a queue is not lost."""


class StagesInTurn:
    """Implements `Executor`: each plan goes through all stages when its result is asked for."""

    def __init__(self, config: ResolvedConfig) -> None:
        num_stages = config.parallel.pipeline_parallel_size
        self.hidden: list[deque[Tensor]] = [deque() for _ in range(num_stages)]
        self.tokens: deque[Tensor] = deque()
        self._shards = [
            Shard(
                config,
                ParallelContext(pp_rank=stage, pp_size=num_stages, pp=QueuedLinks(stage, self.hidden, self.tokens)),
            )
            for stage in range(num_stages)
        ]
        self.num_blocks = min(shard.num_blocks for shard in self._shards)
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def result(self) -> StepResult:
        plan = self._plans.popleft()
        return [shard.launch(plan) for shard in self._shards][-1].result()

    def shutdown(self) -> None:
        self._plans.clear()
