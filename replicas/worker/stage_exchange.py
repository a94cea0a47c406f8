"""What a pipeline stage takes in before each step and hands on after it."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from ..parallel.comm import ParallelContext
from ..parallel.pipeline import PipelineLinks
from ..plan import DEVICE_TOKEN, StepPlan
from .step_inputs import count_decodes


class StageExchange:
    """One stage's exchange with the others, step by step, over its links.

    Hidden states come in and leave through buffers that stay at one address, for CUDA graphs. Just the plan's tokens
    travel: where a graph has room for more, what lies beyond is of an earlier step, and finite. That is why the two
    are not one: padding that went through the layers again and again would not remain so.

    Of tokens all rows' last ones travel, 8 bytes a row, so that the first stage need not remember which rows a step
    sampled. A newer message holds all that an older one did.
    """

    def __init__(
        self,
        comm: ParallelContext,
        links: PipelineLinks,
        last_tokens: Tensor,
        *,
        incoming: Tensor,
        outgoing: Tensor,
    ) -> None:
        self._incoming, self._outgoing = incoming, outgoing  # each [max_tokens, hidden], empty where there is none
        self._links, self._last_tokens, self._num_stages = links, last_tokens, comm.pp_size
        self._is_first, self._is_last = comm.is_first_stage, comm.is_last_stage
        # On the first stage: steps whose tokens have not been taken, and the step that last sampled each row.
        self._owed: deque[int] = deque()
        self._sampled_in = np.full(len(last_tokens), -1, np.int64)

    def incoming(self, num_tokens: int) -> Tensor | None:
        """What the stage before left of a step with room for so many tokens; None on the first stage."""
        return None if self._is_first else self._incoming[:num_tokens]

    def stage_output(self, hidden: Tensor) -> None:
        """Lay a step's hidden states where they leave from."""
        self._outgoing[: len(hidden)].copy_(hidden)

    def recv_before_step(self, plan: StepPlan) -> None:
        """Queue what must have come before the step can run."""
        if not self._is_first:
            self._links.receive_hidden(self._incoming[: len(plan.token_ids)])
            return
        num_decodes = count_decodes(plan)
        readers = plan.rows[:num_decodes][plan.token_ids[:num_decodes] == DEVICE_TOKEN]
        # The last stage cannot be further behind than there are stages, for each hands a step on before it begins the
        # next. So taking tokens that nobody reads yet does not wait for long; left alone they would fill the link.
        self._take_tokens(max(int(self._sampled_in[readers].max(initial=-1)), plan.step - self._num_stages))
        if len(plan.sample_rows):
            self._sampled_in[plan.sample_rows] = plan.step
            self._owed.append(plan.step)

    def send_after_step(self, plan: StepPlan) -> None:
        """Queue what others need of the step."""
        if not self._is_last:
            self._links.send_hidden(self._outgoing[: len(plan.token_ids)])
        elif len(plan.sample_rows):
            self._links.return_tokens(self._last_tokens)

    def synchronize(self) -> None:
        """Take what is owed of all steps, and see what was handed on taken, so that nothing is under way."""
        if self._owed:
            self._take_tokens(self._owed[-1])
        self._links.finish()

    def _take_tokens(self, step: int) -> None:
        """Queue the arrival of the tokens of all steps up to `step`."""
        while self._owed and self._owed[0] <= step:
            self._owed.popleft()
            self._links.receive_tokens(self._last_tokens)


def make_exchange(
    comm: ParallelContext, last_tokens: Tensor, max_tokens: int, hidden_size: int, dtype: torch.dtype
) -> StageExchange | None:
    """The exchange of this rank; None where one stage is all."""
    if comm.pp is None:
        return None
    incoming, outgoing = (
        torch.zeros(0 if unused else max_tokens, hidden_size, dtype=dtype, device=last_tokens.device)
        for unused in (comm.is_first_stage, comm.is_last_stage)
    )
    return StageExchange(comm, comm.pp, last_tokens, incoming=incoming, outgoing=outgoing)
