"""A launched step, until the host reads its result."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..host_copy import HostCopy
from ..plan import LogprobArrays, StepPlan, StepResult
from ..sampling.sampler import NO_TOKEN


@dataclass(slots=True)
class PendingStep:
    """Host copies of a step's results, and its plan."""

    plan: StepPlan
    tokens: HostCopy
    scores: HostCopy | None = None  # of the sampled tokens
    prompt_scores: list[tuple[np.ndarray, HostCopy]] = field(default_factory=list)  # (token ids, scores)

    def result(self) -> StepResult:
        """Wait for the step. Only the last pipeline stage has tokens."""
        (tokens,) = self.tokens.wait()
        token_ids = tokens.astype(np.int32)
        failed = ()
        if (token_ids < 0).any():
            failed = tuple((int(self.plan.sample_rows[k]), NO_TOKEN) for k in np.flatnonzero(token_ids < 0))
        logprobs = None if self.scores is None else _logprob_arrays(token_ids, self.scores)
        prompts = tuple(_logprob_arrays(ids, copy) for ids, copy in self.prompt_scores)
        return StepResult(self.plan.step, token_ids, logprobs, prompts, failed)


def _logprob_arrays(token_ids: np.ndarray, copy: HostCopy) -> LogprobArrays:
    logprobs, ranks, top_ids, top_logprobs = copy.wait()
    return LogprobArrays(
        token_ids=token_ids,
        logprobs=logprobs,
        ranks=ranks.astype(np.int32),
        top_ids=top_ids.astype(np.int32),
        top_logprobs=top_logprobs,
    )
