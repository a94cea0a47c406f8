"""Transfers of a pipeline stage before and after each step."""

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
    """Step-by-step transfers of one stage.

    Hidden states use two buffers at fixed addresses, for CUDA graphs. Only the plan's tokens
    are sent; graph padding keeps finite values of an earlier step. With one buffer, padding
    would pass through the layers repeatedly and overflow.

    The last stage returns every row's latest token (8 bytes each), so the first need not store
    which rows each step sampled. A newer message replaces an older one.
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
        self._incoming, self._outgoing = incoming, outgoing  # each [max_tokens, hidden], or empty if unused
        self._links, self._last_tokens, self._num_stages = links, last_tokens, comm.pp_size
        self._is_first, self._is_last = comm.is_first_stage, comm.is_last_stage
        # First stage: steps whose tokens are pending, and the step that last sampled each row.
        self._expected: deque[int] = deque()
        self._sampled_in = np.full(len(last_tokens), -1, np.int64)

    def incoming(self, num_tokens: int) -> Tensor | None:
        """Receive buffer [num_tokens, hidden]; None on the first stage."""
        return None if self._is_first else self._incoming[:num_tokens]

    def stage_output(self, hidden: Tensor) -> None:
        """Copy a step's hidden states into the send buffer."""
        self._outgoing[: len(hidden)].copy_(hidden)

    def recv_before_step(self, plan: StepPlan) -> None:
        if not self._is_first:
            self._links.receive_hidden(self._incoming[: len(plan.token_ids)])
            return
        num_decodes = count_decodes(plan)
        readers = plan.rows[:num_decodes][plan.token_ids[:num_decodes] == DEVICE_TOKEN]
        # The last stage is at most num_stages steps behind, so early receives wait only briefly.
        # Without them, unread tokens would fill the connection.
        self._receive_tokens(max(int(self._sampled_in[readers].max(initial=-1)), plan.step - self._num_stages))
        if len(plan.sample_rows):
            self._sampled_in[plan.sample_rows] = plan.step
            self._expected.append(plan.step)

    def send_after_step(self, plan: StepPlan) -> None:
        if not self._is_last:
            self._links.send_hidden(self._outgoing[: len(plan.token_ids)])
        elif len(plan.sample_rows):
            self._links.return_tokens(self._last_tokens)

    def synchronize(self) -> None:
        """Receive the tokens of all steps so far, and wait until all sends are received."""
        if self._expected:
            self._receive_tokens(self._expected[-1])
        self._links.finish()

    def _receive_tokens(self, step: int) -> None:
        while self._expected and self._expected[0] <= step:
            self._expected.popleft()
            self._links.receive_tokens(self._last_tokens)


def make_exchange(
    comm: ParallelContext, last_tokens: Tensor, max_tokens: int, hidden_size: int, dtype: torch.dtype
) -> StageExchange | None:
    """This rank's exchange; None with one stage."""
    if comm.pp is None:
        return None
    incoming, outgoing = (
        torch.zeros(0 if unused else max_tokens, hidden_size, dtype=dtype, device=last_tokens.device)
        for unused in (comm.is_first_stage, comm.is_last_stage)
    )
    return StageExchange(comm, comm.pp, last_tokens, incoming=incoming, outgoing=outgoing)
