"""From a plan to a step's tensors: the interface, and its implementation on a CPU, in NumPy. CUDA: device_inputs.py."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels.sampling.params import SamplingRows
from ...kernels.step.step_inputs import RowState
from ..host_copy import HostCopy
from ..layers.batch import AttentionMetadata, GraphShape, InputBatch
from ..plan import DEVICE_TOKEN, StepPlan


def make_row_state(num_rows: int, num_columns: int, device: torch.device) -> RowState:
    """All-zero, greedy state of `num_rows` rows with block tables of `num_columns` entries."""
    return RowState(
        block_tables=torch.zeros(num_rows, num_columns, dtype=torch.int32, device=device),
        last_tokens=torch.zeros(num_rows, dtype=torch.int64, device=device),
        sampling=SamplingRows(
            temperature=torch.zeros(num_rows, device=device),
            top_k=torch.zeros(num_rows, dtype=torch.int32, device=device),
            top_p=torch.ones(num_rows, device=device),
            min_p=torch.zeros(num_rows, device=device),
            seed=torch.zeros(num_rows, dtype=torch.int64, device=device),
        ),
    )


def count_decodes(plan: StepPlan) -> int:
    """Number of slices of one token; these come first."""
    if len(plan.token_ids) == plan.num_slices:
        return plan.num_slices
    return int(np.count_nonzero(plan.num_tokens == 1))


def shape_of(plan: StepPlan) -> GraphShape:
    """The plan's own sizes, without padding."""
    num_decodes = count_decodes(plan)
    return GraphShape(len(plan.token_ids), num_decodes, plan.num_slices - num_decodes, len(plan.sample_rows))


def refuse_drafts(plan: StepPlan) -> None:
    """Raise where a plan has drafts: the runner samples one token a row, at the end of its slice."""
    assert not len(plan.num_drafts), f"step {plan.step} has draft tokens, which this runner cannot verify"


class StepInputs(Protocol):
    """Keeps the row state up to date and makes the tensors of each step."""

    def send(self, plan: StepPlan) -> None:
        """Receive the plan. Exactly one `batch` follows."""
        ...

    def batch(self, shape: GraphShape) -> InputBatch:
        """The tensors of the plan sent last."""
        ...

    def store_sampled_tokens(self, tokens: Tensor, rows: Tensor) -> None:
        """Store tokens int64 [K] (-1: sampling failed) as the last ones of rows int64 [K]."""
        ...

    def fetch_sampled_tokens(self, count: int) -> HostCopy:
        """The tokens of the plan sent last: int64 [count], valid while the step is in flight. Call it after the
        step is queued.
        """
        ...


class HostInputs:
    """`StepInputs` on a CPU: NumPy takes a fifth of torch's time for so few integers."""

    def __init__(self, state: RowState, block_size: int) -> None:
        self._state, self._block_size = state, block_size
        self._block_tables = state.block_tables.numpy()
        self._plan: StepPlan | None = None
        self._kept = torch.empty(0, dtype=torch.int64)

    def send(self, plan: StepPlan) -> None:
        refuse_drafts(plan)
        self._plan = plan
        self._block_tables[plan.table_rows, plan.table_indices] = plan.table_blocks
        sampling = self._state.sampling
        for start in plan.row_starts:
            row, params = start.row, start.sampling
            sampling.temperature[row] = params.temperature
            sampling.top_k[row] = params.top_k
            sampling.top_p[row] = params.top_p
            sampling.min_p[row] = params.min_p
            sampling.seed[row] = int(np.uint64(start.seed).astype(np.int64))

    def batch(self, shape: GraphShape) -> InputBatch:
        plan, num_decodes = self._plan, shape.decodes
        assert plan is not None, "no plan was sent"
        num_tokens = plan.num_tokens
        ends = np.cumsum(num_tokens)
        context_lens = plan.starts + num_tokens
        if shape.prefills == 0:
            token_rows, positions = plan.rows, plan.starts
        else:
            assert (num_tokens[:num_decodes] == 1).all(), "slices of one token come first"
            token_rows = np.repeat(plan.rows, num_tokens)
            offsets = np.arange(ends[-1]) - np.repeat(ends - num_tokens, num_tokens)
            positions = np.repeat(plan.starts, num_tokens) + offsets
        blocks = self._block_tables[token_rows, positions // self._block_size]
        slots = blocks.astype(np.int64) * self._block_size + positions % self._block_size
        tables = self._block_tables[plan.rows, : -(-int(context_lens.max()) // self._block_size)]
        lens = context_lens.astype(np.int32)
        prefill_starts = np.concatenate(([num_decodes], ends[num_decodes:])).astype(np.int32)
        attention = AttentionMetadata(
            slot_mapping=torch.from_numpy(slots),
            decode_lens=torch.from_numpy(lens[:num_decodes]),
            decode_tables=torch.from_numpy(tables[:num_decodes]),
            prefill_starts=torch.from_numpy(prefill_starts),
            prefill_lens=torch.from_numpy(lens[num_decodes:]),
            prefill_tables=torch.from_numpy(tables[num_decodes:]),
        )
        return InputBatch(
            input_ids=self._input_ids(plan, token_rows),
            positions=torch.from_numpy(positions.astype(np.int64)),
            attention=attention,
            sample_indices=torch.from_numpy((ends - 1)[plan.sample_slices]),
            sample_rows=torch.from_numpy(plan.sample_rows.astype(np.int64)),
            sample_positions=torch.from_numpy(context_lens[plan.sample_slices].astype(np.int64)),
        )

    def store_sampled_tokens(self, tokens: Tensor, rows: Tensor) -> None:
        self._state.last_tokens.index_copy_(0, rows, tokens.clamp(min=0))
        self._kept = tokens

    def fetch_sampled_tokens(self, count: int) -> HostCopy:
        return HostCopy([self._kept[:count].numpy()], None)  # of an earlier plan where this one samples nothing

    def _input_ids(self, plan: StepPlan, token_rows: np.ndarray) -> Tensor:
        last_tokens = self._state.last_tokens
        unknown = np.flatnonzero(plan.token_ids == DEVICE_TOKEN)
        if len(unknown) == len(plan.token_ids):
            return last_tokens.index_select(0, torch.from_numpy(token_rows))
        input_ids = torch.from_numpy(plan.token_ids.astype(np.int64))
        if len(unknown):
            input_ids[torch.from_numpy(unknown)] = last_tokens[torch.from_numpy(token_rows[unknown])]
        return input_ids
