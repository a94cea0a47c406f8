"""Step inputs on a CUDA device: one packed plan a step travels, buffers that stay do the rest.

Every address is fixed, so that a CUDA graph captured over these tensors runs any later plan.
"""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.step_inputs import HEADER, ROW_START, Place, RowState, StepTensors, keep_tokens, load_plan
from .batch import AttentionMetadata, InputBatch, Room
from .host_copy import HostCopy
from .plan import RowStart, StepPlan
from .step_inputs import count_decodes


class PackedPlan:
    """A plan as the one array of integers that kernels/step_inputs.py reads, in host memory.

    Sized for the largest plan: every row runs, starts, forks and has its whole table written.
    """

    def __init__(self, num_rows: int, num_columns: int, max_tokens: int, *, pinned: bool = False) -> None:
        size = HEADER + 5 * num_rows + 1 + max_tokens + 3 * num_rows * num_columns + ROW_START * num_rows
        self.values = torch.zeros(size, dtype=torch.int32, pin_memory=pinned)
        self._array = self.values.numpy()

    def fill(self, plan: StepPlan, turn: int) -> int:
        """Writes the plan; returns how many integers of `values` it takes."""
        array, end = self._array, HEADER
        num_slices = plan.num_slices

        def put(place: int, *parts: np.ndarray) -> None:
            nonlocal end
            array[place] = end
            for part in parts:
                array[end : end + len(part)] = part
                end += len(part)

        array[Place.TURN], array[Place.NUM_SLICES], array[Place.NUM_TOKENS] = turn, num_slices, len(plan.token_ids)
        array[Place.NUM_DECODES] = count_decodes(plan)
        array[Place.NUM_SAMPLES], array[Place.NUM_UPDATES] = len(plan.sample_rows), len(plan.table_rows)
        array[Place.NUM_STARTS] = len(plan.row_starts)
        put(Place.ROWS, plan.rows)
        put(Place.STARTS, plan.starts)
        array[end] = 0
        np.cumsum(plan.num_tokens, out=array[end + 1 : end + 1 + num_slices])
        array[Place.CU_SEQLENS] = end
        end += num_slices + 1
        put(Place.TOKEN_IDS, plan.token_ids)
        put(Place.SAMPLE_SLICES, plan.sample_slices)
        put(Place.SAMPLE_ROWS, plan.sample_rows)
        put(Place.UPDATES, plan.table_rows, plan.table_indices, plan.table_blocks)
        put(Place.ROW_STARTS, *(_pack_start(start) for start in plan.row_starts))
        return end


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
        self._hosts = [PackedPlan(num_rows, num_columns, max_tokens, pinned=pinned) for _ in range(turns)]
        self._packed = torch.zeros_like(self._hosts[0].values, device=device)
        # In host memory, where the kernel that ends a step writes it. A copy on a stream of its own costs the host
        # 70 us a step on an H200's machine, with its events and its pinned memory.
        self._ring = torch.zeros(turns, num_rows, dtype=torch.int64, pin_memory=pinned)
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

    def send(self, plan: StepPlan, turn: int) -> None:
        """Queue the copy of the plan to the device."""
        host = self._hosts[turn]
        count = host.fill(plan, turn)
        self._packed[:count].copy_(host.values[:count], non_blocking=True)

    def batch(self, room: Room) -> InputBatch:
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

    def keep(self, tokens: torch.Tensor, rows: torch.Tensor) -> None:
        """Queue the kernel that notes the tokens."""
        keep_tokens(tokens, rows, self._packed, self._state.last_tokens, self._ring)

    def kept(self, turn: int, count: int) -> HostCopy:
        """As StepInputs says."""
        done = self._done[turn]
        if done is not None:
            done.record()
        return HostCopy([self._ring[turn, :count]], done)
