"""The model's input tensors of a step, expanded on the device from the step's packed plan.

The host copies one int32 array a step. A CUDA graph that begins with these kernels runs any plan that fits
its shapes.

    apply:   block_tables[row, index] = block; sampling[row] = parameters                        changes of the plan
    expand:  token t of slice s, at offset o = t - cu_seqlens[s]:
             position = starts[s] + o;  slot = block_tables[row[s], position // BS] * BS + position % BS
             id = token_ids[t], or last_tokens[row[s]] where that is DEVICE_TOKEN
    store:   last_tokens[row[k]] = token[k]; ring[turn, k] = token[k]                            samples of the plan

Letters: R rows (the last for padding samples), M blocks of a row, BS block_size, T tokens, D decode slices, P
prefill slices, K samples; S, T', D', K', U, N are the plan's slices, tokens, decodes, samples, block table
updates and row starts.

A packed plan is a header (PLACES: the ring's turn, counts, array offsets) and PACKED_ARRAYS, concatenated.
Called by replicas/worker/device_inputs.py. `*_ref` loop over the same plan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ..backend import Backend, backend_of
from ..sampling.params import SamplingRows

# A row start: row, temperature, top_k, top_p, min_p (float bits), seed's low and high half.
ROW_START = 7

# Arrays of a packed plan, in order, with lengths. Names are StepPlan's, except cu_seqlens (running
# sums of num_tokens) and row_starts (ROW_START integers each).
PACKED_ARRAYS = {
    "rows": "S",
    "starts": "S",
    "cu_seqlens": "S + 1",
    "token_ids": "T'",
    "sample_slices": "K'",
    "sample_rows": "K'",
    "table_rows": "U",
    "table_indices": "U",
    "table_blocks": "U",
    "row_starts": "N",
}
PACKED_COUNTS = ("turn", "num_slices", "num_decodes", "num_tokens", "num_samples", "num_updates", "num_starts")
PLACES = {name: place for place, name in enumerate((*PACKED_COUNTS, *PACKED_ARRAYS))}
HEADER = len(PLACES)


class RowState(NamedTuple):
    """Per-row state that the device keeps between steps."""

    block_tables: torch.Tensor  # int32 [R, M]
    last_tokens: torch.Tensor  # int64 [R]
    sampling: SamplingRows  # each [R]


class StepTensors(NamedTuple):
    """Output of `expand`. T, D, P and K are capacities; entries beyond the plan's are padding."""

    input_ids: torch.Tensor  # int64 [T], 0 is padding
    positions: torch.Tensor  # int64 [T], 0 is padding
    slot_mapping: torch.Tensor  # int64 [T], -1 is padding
    decode_lens: torch.Tensor  # int32 [D], 0 is padding
    decode_tables: torch.Tensor  # int32 [D, M], undefined beyond a context's blocks
    prefill_starts: torch.Tensor  # int32 [P + 1], the step's end for padding
    prefill_lens: torch.Tensor  # int32 [P], 0 is padding
    prefill_tables: torch.Tensor  # int32 [P, M], likewise
    sample_indices: torch.Tensor  # int64 [K], 0 is padding
    sample_rows: torch.Tensor  # int64 [K], R - 1 is padding
    sample_positions: torch.Tensor  # int64 [K], 0 is padding

    def first(self, *, tokens: int, decodes: int, prefills: int, samples: int) -> StepTensors:
        """Views of the leading entries of each tensor."""
        return StepTensors(
            input_ids=self.input_ids[:tokens],
            positions=self.positions[:tokens],
            slot_mapping=self.slot_mapping[:tokens],
            decode_lens=self.decode_lens[:decodes],
            decode_tables=self.decode_tables[:decodes],
            prefill_starts=self.prefill_starts[: prefills + 1],
            prefill_lens=self.prefill_lens[:prefills],
            prefill_tables=self.prefill_tables[:prefills],
            sample_indices=self.sample_indices[:samples],
            sample_rows=self.sample_rows[:samples],
            sample_positions=self.sample_positions[:samples],
        )


def section(plan: np.ndarray, name: str, count: int) -> np.ndarray:
    """The first `count` integers of a plan array."""
    begin = int(plan[PLACES[name]])
    return plan[begin : begin + count]


def apply_plan_ref(packed: torch.Tensor, state: RowState) -> None:
    """One by one, in place."""
    plan = packed.cpu().numpy()
    num_updates, num_starts = int(plan[PLACES["num_updates"]]), int(plan[PLACES["num_starts"]])
    updates = (section(plan, name, num_updates).tolist() for name in ("table_rows", "table_indices", "table_blocks"))
    for row, index, block in zip(*updates, strict=True):
        state.block_tables[row, index] = block
    for start in section(plan, "row_starts", ROW_START * num_starts).reshape(-1, ROW_START):
        row, floats = int(start[0]), start.view(np.float32)
        state.sampling.temperature[row] = float(floats[1])
        state.sampling.top_k[row] = int(start[2])
        state.sampling.top_p[row] = float(floats[3])
        state.sampling.min_p[row] = float(floats[4])
        state.sampling.seed[row] = int(start[5:7].view(np.int64)[0])


def expand_plan_ref(packed: torch.Tensor, state: RowState, block_size: int, out: StepTensors) -> None:
    """Token by token and slice by slice, in place."""
    plan = packed.cpu().numpy()
    num_slices, num_decodes, num_tokens, num_samples = (
        int(plan[PLACES[name]]) for name in ("num_slices", "num_decodes", "num_tokens", "num_samples")
    )
    rows, starts = section(plan, "rows", num_slices).tolist(), section(plan, "starts", num_slices).tolist()
    cu = section(plan, "cu_seqlens", num_slices + 1).tolist()
    token_ids = section(plan, "token_ids", num_tokens).tolist()
    for tensor, padding in ((out.input_ids, 0), (out.positions, 0), (out.slot_mapping, -1), (out.decode_lens, 0)):
        tensor.fill_(padding)
    out.prefill_starts.fill_(num_tokens)
    out.prefill_lens.zero_()
    out.sample_indices.zero_()
    out.sample_rows.fill_(len(state.last_tokens) - 1)
    out.sample_positions.zero_()
    for s, (row, start) in enumerate(zip(rows, starts, strict=True)):
        length = start + cu[s + 1] - cu[s]
        blocks = state.block_tables[row, : -(-length // block_size)]
        if s < num_decodes:
            out.decode_lens[s], out.decode_tables[s, : len(blocks)] = length, blocks
        else:
            p = s - num_decodes
            out.prefill_starts[p], out.prefill_lens[p], out.prefill_tables[p, : len(blocks)] = cu[s], length, blocks
        for t in range(cu[s], cu[s + 1]):
            position = start + t - cu[s]
            out.input_ids[t] = token_ids[t] if token_ids[t] >= 0 else state.last_tokens[row]
            out.positions[t] = position
            out.slot_mapping[t] = blocks[position // block_size] * block_size + position % block_size
    samples = (section(plan, name, num_samples).tolist() for name in ("sample_slices", "sample_rows"))
    for k, (s, row) in enumerate(zip(*samples, strict=True)):
        out.sample_indices[k], out.sample_rows[k] = cu[s + 1] - 1, row
        out.sample_positions[k] = starts[s] + cu[s + 1] - cu[s]


def store_tokens_ref(
    tokens: torch.Tensor, rows: torch.Tensor, packed: torch.Tensor, last_tokens: torch.Tensor, ring: torch.Tensor
) -> None:
    """One by one, in place. A failed sample (-1) stores token 0, a valid id."""
    for k, (token, row) in enumerate(zip(tokens.tolist(), rows.tolist(), strict=True)):
        last_tokens[row] = max(token, 0)
        ring[int(packed[PLACES["turn"]]), k] = token


def load_plan(packed: torch.Tensor, state: RowState, block_size: int, out: StepTensors) -> None:
    """Apply the packed plan to `state` and fill `out`, with padding as in StepTensors.

    Raises ValueError where block_size is not a power of two.
    """
    if block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size} is not a power of two")
    if backend_of(packed) is Backend.TORCH:
        apply_plan_ref(packed, state)
        expand_plan_ref(packed, state, block_size, out)
        return
    from .step_inputs_triton import apply_plan_triton, expand_plan_triton

    apply_plan_triton(packed, state)
    expand_plan_triton(packed, state, block_size, out)


def store_tokens(
    tokens: torch.Tensor, rows: torch.Tensor, packed: torch.Tensor, last_tokens: torch.Tensor, ring: torch.Tensor
) -> None:
    """Store tokens int64 [K] (-1: sampling failed) for the next step, and in the host's ring.

    rows int64 [K]; last_tokens int64 [R]; ring int64 [turns, >= K], on the device or pinned. The plan names
    the turn.
    """
    if tokens.shape != rows.shape or len(tokens) > ring.shape[1]:
        raise ValueError(f"{tuple(tokens.shape)} tokens for {tuple(rows.shape)} rows and a ring {tuple(ring.shape)}")
    if backend_of(packed) is Backend.TORCH:
        store_tokens_ref(tokens, rows, packed, last_tokens, ring)
        return
    from .step_inputs_triton import store_tokens_triton

    store_tokens_triton(tokens, rows, packed, last_tokens, ring)
