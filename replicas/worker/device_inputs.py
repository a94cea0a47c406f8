"""Step inputs on a CUDA device: the host copies one packed plan a step, and kernels expand it into fixed
buffers.

A CUDA graph captured over these buffers runs any later plan. A step's last kernel writes the sampled tokens to
pinned host memory: a copy on its own stream costs the host of an H200 70 us a step.
"""

from __future__ import annotations

from itertools import accumulate
from operator import attrgetter

import numpy as np
import torch

from ...kernels.step.step_inputs import HEADER, PACKED_ARRAYS, ROW_START, RowState, StepTensors, load_plan, store_tokens
from ..host_copy import HostCopy
from ..layers.batch import AttentionMetadata, GraphShape, InputBatch
from ..plan import NO_INTS, Ints, RowStart, StepPlan
from .step_inputs import count_decodes, refuse_drafts

_COPIED = 512  # a copy is a multiple of so many integers

_CU_SEQLENS = list(PACKED_ARRAYS).index("cu_seqlens")
_ROW_STARTS = list(PACKED_ARRAYS).index("row_starts")
# Two are derived: cu_seqlens from num_tokens, row_starts by `_pack_start`.
_arrays_of = attrgetter(*("num_tokens" if name == "cu_seqlens" else name for name in PACKED_ARRAYS))


def packed_size(num_rows: int, num_columns: int, max_tokens: int) -> int:
    """Integers of the largest packed plan: every row runs, starts, forks and writes its whole table."""
    lengths = {"T'": max_tokens, "U": num_rows * num_columns, "N": ROW_START * num_rows, "S + 1": num_rows + 1}
    return HEADER + sum(lengths.get(length, num_rows) for length in PACKED_ARRAYS.values())


def pack_plan(plan: StepPlan, turn: int, array: Ints) -> int:
    """Write the plan into `array` as kernels/step/step_inputs.py reads it; return the number of integers."""
    num_slices = plan.num_slices
    arrays: list[Ints] = list(_arrays_of(plan))
    arrays[_CU_SEQLENS] = cu_seqlens = np.zeros(num_slices + 1, np.int32)
    np.add.accumulate(plan.num_tokens, out=cu_seqlens[1:])  # 1 us less than num_tokens.cumsum
    arrays[_ROW_STARTS] = np.concatenate(list(map(_pack_start, plan.row_starts))) if plan.row_starts else NO_INTS
    *begins, end = accumulate(map(len, arrays), initial=HEADER)
    array[:HEADER] = (
        turn, num_slices, count_decodes(plan), len(plan.token_ids), len(plan.sample_rows), len(plan.table_rows),
        len(plan.row_starts), *begins,
    )  # fmt: skip
    np.concatenate(arrays, out=array[HEADER:end])
    return end


def _pack_start(start: RowStart) -> np.ndarray:
    params, packed = start.sampling, np.empty(ROW_START, np.int32)
    packed[0], packed[2] = start.row, params.top_k
    packed.view(np.float32)[[1, 3, 4]] = params.temperature, params.top_p, params.min_p
    packed[5:7] = np.array([start.seed], np.uint64).view(np.int32)
    return packed


class DeviceInputs:
    """`StepInputs` on a CUDA device, with a host buffer for each of `turns` plans in flight."""

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
        refuse_drafts(plan)
        self._turn = turn = (self._turn + 1) % self._turns
        count = -(-pack_plan(plan, turn, self._sent_arrays[turn]) // _COPIED) * _COPIED
        copy = self._copies.get((turn, count))
        if copy is None:  # the two slices take the host as long as the copy itself
            copy = self._copies[turn, count] = self._packed[:count], self._sent[turn, :count]
        copy[0].copy_(copy[1], non_blocking=True)

    def batch(self, shape: GraphShape) -> InputBatch:
        """Queue the kernels that expand the plan; return its tensors, padded to the shape."""
        part = self._tensors.first(
            tokens=shape.tokens, decodes=shape.decodes, prefills=shape.prefills, samples=shape.samples
        )
        load_plan(self._packed, self._state, self._block_size, part)
        attention = AttentionMetadata(
            slot_mapping=part.slot_mapping,
            decode_lens=part.decode_lens,
            decode_tables=part.decode_tables,
            prefill_starts=part.prefill_starts,
            prefill_lens=part.prefill_lens,
            prefill_tables=part.prefill_tables,
        )
        return InputBatch(
            input_ids=part.input_ids,
            positions=part.positions,
            attention=attention,
            sample_indices=part.sample_indices,
            sample_rows=part.sample_rows,
            sample_positions=part.sample_positions,
        )

    def store_sampled_tokens(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """Queue the kernel that stores the tokens."""
        store_tokens(tokens, rows, self._packed, self._state.last_tokens, self._ring)

    def fetch_sampled_tokens(self, count: int) -> HostCopy:
        """As `StepInputs.fetch_sampled_tokens`."""
        done = self._done[self._turn]
        if done is not None:
            done.record()
        return HostCopy([self._ring_arrays[self._turn][:count]], done)
