"""What a step's kernels read, made on the device from the step's packed plan.

The host sends one array of integers a step; everything that follows from it (positions, cache slots, context lengths,
block tables, the tokens that only the device knows) is worked out where it is used. So a step costs the host one copy,
and a CUDA graph that begins here runs any plan that fits its shapes.

    apply:   block_tables[row, index] = block; sampling[row] = parameters                        what the plan changes
    expand:  token t of slice s, at offset o = t - cu_seqlens[s]:
             position = start[s] + o;  slot = block_tables[row[s], position // BS] * BS + position % BS
             id = token_ids[t], or last_tokens[row[s]] where that is DEVICE_TOKEN
    keep:    last_tokens[row[k]] = token[k]; ring[turn, k] = token[k]                            what the plan sampled

Letters: R rows (the last is nobody's: padding samples into it), M blocks of a row, BS block_size, T tokens, D decode
slices, P prefill slices, K samples; S, T', D', K' what the plan has of slices, tokens, decodes and samples.

A packed plan is int32: HEADER integers (below), then, one after the other, rows [S], starts [S], cu_seqlens [S + 1],
token_ids [T'], sample_slices [K'], sample_rows [K'], table updates [3, U], row starts [N, ROW_START].
Called by replicas/worker/device_inputs.py. `*_ref` are loops over the same packed plan.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch

from ..backend import Backend, backend_of
from ..sampling.sample import SamplingRows


class Place(IntEnum):
    """Places of the header: the turn of the ring, the counts, and where each section begins."""

    TURN = 0
    NUM_SLICES = 1
    NUM_DECODES = 2
    NUM_TOKENS = 3
    NUM_SAMPLES = 4
    NUM_UPDATES = 5
    NUM_STARTS = 6
    ROWS = 7
    STARTS = 8
    CU_SEQLENS = 9
    TOKEN_IDS = 10
    SAMPLE_SLICES = 11
    SAMPLE_ROWS = 12
    UPDATES = 13
    ROW_STARTS = 14


HEADER = 16
# A row's start: row, temperature, top_k, top_p, min_p (floats by their bits), seed's low and high half.
ROW_START = 7


class RowState(NamedTuple):
    """What the device keeps of each row from step to step."""

    block_tables: torch.Tensor  # int32 [R, M]
    last_tokens: torch.Tensor  # int64 [R]
    sampling: SamplingRows  # each [R]


class StepTensors(NamedTuple):
    """What `expand` writes. T, D, P and K are what there is room for; what the plan does not fill is padding."""

    input_ids: torch.Tensor  # int64 [T], 0 is padding
    positions: torch.Tensor  # int64 [T], 0 is padding
    slot_mapping: torch.Tensor  # int64 [T], -1 is padding
    decode_lens: torch.Tensor  # int32 [D], 0 is padding
    decode_tables: torch.Tensor  # int32 [D, M], beyond a context's blocks not defined
    prefill_starts: torch.Tensor  # int32 [P + 1], the step's end for padding
    prefill_lens: torch.Tensor  # int32 [P], 0 is padding
    prefill_tables: torch.Tensor  # int32 [P, M], likewise
    sample_indices: torch.Tensor  # int64 [K], 0 is padding
    sample_rows: torch.Tensor  # int64 [K], R - 1 is padding
    sample_positions: torch.Tensor  # int64 [K], 0 is padding


def apply_plan_ref(packed: torch.Tensor, state: RowState) -> None:
    """Table updates and row starts, one by one, in place."""
    plan = packed.cpu().numpy()
    num_updates, begin = int(plan[Place.NUM_UPDATES]), int(plan[Place.UPDATES])
    for row, index, block in plan[begin : begin + 3 * num_updates].reshape(3, -1).T.tolist():
        state.block_tables[row, index] = block
    begin = int(plan[Place.ROW_STARTS])
    for start in plan[begin : begin + ROW_START * int(plan[Place.NUM_STARTS])].reshape(-1, ROW_START):
        row, floats = int(start[0]), start.view(np.float32)
        state.sampling.temperature[row] = float(floats[1])
        state.sampling.top_k[row] = int(start[2])
        state.sampling.top_p[row] = float(floats[3])
        state.sampling.min_p[row] = float(floats[4])
        state.sampling.seed[row] = int(start[5:7].view(np.int64)[0])


def expand_plan_ref(packed: torch.Tensor, state: RowState, block_size: int, out: StepTensors) -> None:
    """Token by token and slice by slice, in place."""
    plan = packed.cpu().numpy()
    num_slices, num_decodes, num_tokens = (
        int(plan[i]) for i in (Place.NUM_SLICES, Place.NUM_DECODES, Place.NUM_TOKENS)
    )

    def section(place: int, count: int) -> list[int]:
        return plan[plan[place] : plan[place] + count].tolist()

    rows, starts, cu = (
        section(Place.ROWS, num_slices),
        section(Place.STARTS, num_slices),
        section(Place.CU_SEQLENS, num_slices + 1),
    )
    token_ids = section(Place.TOKEN_IDS, num_tokens)
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
    num_samples = int(plan[Place.NUM_SAMPLES])
    for k, (s, row) in enumerate(
        zip(section(Place.SAMPLE_SLICES, num_samples), section(Place.SAMPLE_ROWS, num_samples), strict=True)
    ):
        out.sample_indices[k], out.sample_rows[k] = cu[s + 1] - 1, row
        out.sample_positions[k] = starts[s] + cu[s + 1] - cu[s]


def keep_tokens_ref(
    tokens: torch.Tensor, rows: torch.Tensor, packed: torch.Tensor, last_tokens: torch.Tensor, ring: torch.Tensor
) -> None:
    """One by one, in place; a failed sample (-1) leaves token 0 for its row, which the next step can look up."""
    for k, (token, row) in enumerate(zip(tokens.tolist(), rows.tolist(), strict=True)):
        last_tokens[row] = max(token, 0)
        ring[int(packed[Place.TURN]), k] = token


def load_plan(packed: torch.Tensor, state: RowState, block_size: int, out: StepTensors) -> None:
    """Applies the packed plan to `state` and fills `out` from the two.

    Raises ValueError where block_size is not a power of two. Padding is what the legend of StepTensors says, so that
    tensors with more room than the plan needs are as good as exact ones.
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


def keep_tokens(
    tokens: torch.Tensor, rows: torch.Tensor, packed: torch.Tensor, last_tokens: torch.Tensor, ring: torch.Tensor
) -> None:
    """Keeps tokens int64 [K] (-1: no token could be chosen) for the next step, and in the ring's turn for the host.

    rows int64 [K]; last_tokens int64 [R]; ring int64 [turns, >= K], on the device or in pinned host memory, which the
    kernel writes all the same. The turn is the packed plan's.
    """
    if tokens.shape != rows.shape or len(tokens) > ring.shape[1]:
        raise ValueError(f"{tuple(tokens.shape)} tokens for {tuple(rows.shape)} rows and a ring {tuple(ring.shape)}")
    if backend_of(packed) is Backend.TORCH:
        keep_tokens_ref(tokens, rows, packed, last_tokens, ring)
        return
    from .step_inputs_triton import keep_tokens_triton

    keep_tokens_triton(tokens, rows, packed, last_tokens, ring)
