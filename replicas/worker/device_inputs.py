"""Step inputs on a CUDA device: one packed plan a step travels, buffers that stay do the rest.

Every address is fixed, so that a CUDA graph captured over these tensors runs any later plan. The sampled tokens lie in
host memory, which a step's last kernel writes: a copy on a stream of its own costs the host of an H200 70 us a step.
"""

from __future__ import annotations

import numpy as np
import torch

from ...kernels.step.step_inputs import HEADER, ROW_START, RowState, StepTensors, keep_tokens, load_plan
from ..host_copy import HostCopy
from ..layers.batch import AttentionMetadata, GraphShape, InputBatch
from ..plan import Ints, RowStart, StepPlan
from .step_inputs import count_decodes

_COPIED = 512  # integers; a plan is copied in so many or a multiple of them


def packed_size(num_rows: int, num_columns: int, max_tokens: int) -> int:
    """Integers of the largest packed plan: every row runs, starts, forks and has its whole table written."""
    return HEADER + 5 * num_rows + 1 + max_tokens + 3 * num_rows * num_columns + ROW_START * num_rows


def pack_plan(plan: StepPlan, turn: int, array: Ints) -> int:
    """Write the plan into `array` as kernels/step/step_inputs.py reads it; return the number of integers."""
    num_slices, num_samples = plan.num_slices, len(plan.sample_rows)
    num_tokens, num_updates = len(plan.token_ids), len(plan.table_rows)
    rows = HEADER
    starts = rows + num_slices
    cu_seqlens = starts + num_slices
    token_ids = cu_seqlens + num_slices + 1
    sample_slices = token_ids + num_tokens
    sample_rows = sample_slices + num_samples
    updates = sample_rows + num_samples
    row_starts = updates + 3 * num_updates
    array[rows:starts], array[starts:cu_seqlens] = plan.rows, plan.starts
    array[cu_seqlens] = 0
    plan.num_tokens.cumsum(out=array[cu_seqlens + 1 : token_ids])
    array[token_ids:sample_slices] = plan.token_ids
    array[sample_slices:sample_rows], array[sample_rows:updates] = plan.sample_slices, plan.sample_rows
    if num_updates:
        array[updates:row_starts].reshape(3, -1)[:] = plan.table_rows, plan.table_indices, plan.table_blocks
    for begin, start in enumerate(plan.row_starts):
        array[row_starts + begin * ROW_START :][:ROW_START] = _pack_start(start)
    # In the order of Place; the last is not used.
    array[:HEADER] = (
        turn, num_slices, count_decodes(plan), num_tokens, num_samples, num_updates, len(plan.row_starts),
        rows, starts, cu_seqlens, token_ids, sample_slices, sample_rows, updates, row_starts, 0,
    )  # fmt: skip
    return row_starts + ROW_START * len(plan.row_starts)


def _pack_start(start: RowStart) -> np.ndarray:
    params, packed = start.sampling, np.empty(ROW_START, np.int32)
    packed[0], packed[2] = start.row, params.top_k
    packed.view(np.float32)[[1, 3, 4]] = params.temperature, params.top_p, params.min_p
    packed[5:7] = np.array([start.seed], np.uint64).view(np.int32)
    return packed


class DeviceInputs:
    """`StepInputs` on a CUDA device. `turns` plans may be under way at once, each in a host buffer of its own."""

    def __init__(self, state: RowState, block_size: int, max_tokens: int, turns: int) -> None:
        num_rows, num_columns = state.block_tables.shape
        device = state.last_tokens.device
        self._state, self._block_size = state, block_size
        pinned = device.type == "cuda"
        self._turn, self._turns = 0, turns
        size = -(-packed_size(num_rows, num_columns, max_tokens) // _COPIED) * _COPIED
        self._sent = torch.zeros(turns, size, dtype=torch.int32, pin_memory=pinned)
        self._ring = torch.zeros(turns, num_rows, dtype=torch.int64, pin_memory=pinned)
        self._sent_arrays, self._ring_arrays = list(self._sent.numpy()), list(self._ring.numpy())
        self._packed = torch.zeros(size, dtype=torch.int32, device=device)
        self._copies: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # by turn and size
        self._done = [torch.cuda.Event() if pinned else None for _ in range(turns)]

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        long = torch.int64
        self._tensors = StepTensors(
            input_ids=ints(max_tokens, dtype=long),
            positions=ints(max_tokens, dtype=long),
            slot_mapping=ints(max_tokens, dtype=long),
            decode_lens=ints(num_rows),
            decode_tables=ints(num_rows, num_columns),
            prefill_starts=ints(num_rows + 1),
            prefill_lens=ints(num_rows),
            prefill_tables=ints(num_rows, num_columns),
            sample_indices=ints(num_rows, dtype=long),
            sample_rows=ints(num_rows, dtype=long),
            sample_positions=ints(num_rows, dtype=long),
        )

    def send(self, plan: StepPlan) -> None:
        """Queue the copy of the plan to the device."""
        self._turn = turn = (self._turn + 1) % self._turns
        count = -(-pack_plan(plan, turn, self._sent_arrays[turn]) // _COPIED) * _COPIED
        copy = self._copies.get((turn, count))
        if copy is None:  # the two slices take the host as long as the copy itself
            copy = self._copies[turn, count] = self._packed[:count], self._sent[turn, :count]
        copy[0].copy_(copy[1], non_blocking=True)

    def batch(self, room: GraphShape) -> InputBatch:
        """Queue the kernels that expand the plan; its tensors, with as much room as is asked for."""
        counts = [room.tokens] * 3 + [room.decodes] * 2 + [room.prefills + 1] + [room.prefills] * 2 + [room.samples] * 3
        part = StepTensors._make(tensor[:count] for tensor, count in zip(self._tensors, counts, strict=True))
        load_plan(self._packed, self._state, self._block_size, part)
        attention = AttentionMetadata(
            part.slot_mapping,
            part.decode_lens,
            part.decode_tables,
            part.prefill_starts,
            part.prefill_lens,
            part.prefill_tables,
        )
        return InputBatch(
            part.input_ids, part.positions, attention, part.sample_indices, part.sample_rows, part.sample_positions
        )

    def store_sampled_tokens(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """Queue the kernel that notes the tokens."""
        keep_tokens(tokens, rows, self._packed, self._state.last_tokens, self._ring)

    def fetch_sampled_tokens(self, count: int) -> HostCopy:
        """As StepInputs says."""
        done = self._done[self._turn]
        if done is not None:
            done.record()
        return HostCopy([self._ring_arrays[self._turn][:count]], done)
