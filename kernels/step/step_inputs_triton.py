"""Triton kernels of step_inputs.py. Counts are read on the device; grids depend on capacities."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .step_inputs import PLACES, ROW_START, RowState, StepTensors

# Kernels read globals only as constexpr.
_TURN = tl.constexpr(PLACES["turn"])
_NUM_SLICES = tl.constexpr(PLACES["num_slices"])
_NUM_DECODES = tl.constexpr(PLACES["num_decodes"])
_NUM_TOKENS = tl.constexpr(PLACES["num_tokens"])
_NUM_SAMPLES = tl.constexpr(PLACES["num_samples"])
_NUM_UPDATES = tl.constexpr(PLACES["num_updates"])
_NUM_STARTS = tl.constexpr(PLACES["num_starts"])
_ROWS = tl.constexpr(PLACES["rows"])
_STARTS = tl.constexpr(PLACES["starts"])
_CU_SEQLENS = tl.constexpr(PLACES["cu_seqlens"])
_TOKEN_IDS = tl.constexpr(PLACES["token_ids"])
_SAMPLE_SLICES = tl.constexpr(PLACES["sample_slices"])
_SAMPLE_ROWS = tl.constexpr(PLACES["sample_rows"])
_TABLE_ROWS = tl.constexpr(PLACES["table_rows"])
_TABLE_INDICES = tl.constexpr(PLACES["table_indices"])
_TABLE_BLOCKS = tl.constexpr(PLACES["table_blocks"])
_ROW_STARTS = tl.constexpr(PLACES["row_starts"])
_ROW_START = tl.constexpr(ROW_START)

_TOKENS, _COLUMNS, _CHANGES = 128, 256, 1024  # per program or loop iteration


@triton.jit
def _section(packed_ptr, place):
    """Address of one plan array."""
    return packed_ptr + tl.load(packed_ptr + place)


@triton.jit
def _apply_plan_kernel(
    packed_ptr,
    block_tables_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    num_columns,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program applies all changes (rarely over a few dozen)."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    num_updates, num_starts = tl.load(packed_ptr + _NUM_UPDATES), tl.load(packed_ptr + _NUM_STARTS)
    rows, indices = _section(packed_ptr, _TABLE_ROWS), _section(packed_ptr, _TABLE_INDICES)
    blocks = _section(packed_ptr, _TABLE_BLOCKS)
    for begin in range(0, num_updates, BLOCK):
        u = begin + tl.arange(0, BLOCK)
        mask = u < num_updates
        row = tl.load(rows + u, mask=mask, other=0).to(tl.int64)
        column = tl.load(indices + u, mask=mask, other=0)
        block = tl.load(blocks + u, mask=mask, other=0)
        tl.store(block_tables_ptr + row * num_columns + column, block, mask=mask)
    starts = _section(packed_ptr, _ROW_STARTS)
    for begin in range(0, num_starts, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        mask = n < num_starts
        start = starts + n * _ROW_START
        row = tl.load(start, mask=mask, other=0)
        temperature = tl.load(start + 1, mask=mask, other=0).to(tl.float32, bitcast=True)
        top_k = tl.load(start + 2, mask=mask, other=0)
        top_p = tl.load(start + 3, mask=mask, other=0).to(tl.float32, bitcast=True)
        min_p = tl.load(start + 4, mask=mask, other=0).to(tl.float32, bitcast=True)
        low = tl.load(start + 5, mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF
        high = tl.load(start + 6, mask=mask, other=0).to(tl.int64) << 32
        tl.store(temperature_ptr + row, temperature, mask=mask)
        tl.store(top_k_ptr + row, top_k, mask=mask)
        tl.store(top_p_ptr + row, top_p, mask=mask)
        tl.store(min_p_ptr + row, min_p, mask=mask)
        tl.store(seed_ptr + row, low | high, mask=mask)


@triton.jit
def _expand_tokens(
    packed_ptr, block_tables_ptr, last_tokens_ptr, input_ids_ptr, positions_ptr, slots_ptr,
    sample_indices_ptr, sample_rows_ptr, sample_positions_ptr,
    tile, num_rows, num_columns, max_tokens, max_samples, search_steps,
    BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Expand a tile of tokens and the samples of the same indices."""
    num_slices, num_tokens = tl.load(packed_ptr + _NUM_SLICES), tl.load(packed_ptr + _NUM_TOKENS)
    rows, starts, cu = _section(packed_ptr, _ROWS), _section(packed_ptr, _STARTS), _section(packed_ptr, _CU_SEQLENS)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    live = t < num_tokens
    # A token's slice is the last that starts at or before it: binary search of all tokens at once.
    low, high = tl.zeros([TOKENS], tl.int32), tl.zeros([TOKENS], tl.int32) + num_slices
    for _ in range(search_steps):
        middle = (low + high) // 2
        before = tl.load(cu + middle, mask=live, other=0) <= t
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    row = tl.load(rows + low, mask=live, other=0).to(tl.int64)
    position = tl.load(starts + low, mask=live, other=0) + t - tl.load(cu + low, mask=live, other=0)
    token = tl.load(_section(packed_ptr, _TOKEN_IDS) + t, mask=live, other=0).to(tl.int64)
    token = tl.where(token < 0, tl.load(last_tokens_ptr + row, mask=live, other=0), token)
    block = tl.load(block_tables_ptr + row * num_columns + position // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    in_range = t < max_tokens
    tl.store(input_ids_ptr + t, tl.where(live, token, 0), mask=in_range)
    tl.store(positions_ptr + t, tl.where(live, position, 0).to(tl.int64), mask=in_range)
    tl.store(slots_ptr + t, tl.where(live, block * BLOCK_SIZE + position % BLOCK_SIZE, -1), mask=in_range)

    sampled = t < tl.load(packed_ptr + _NUM_SAMPLES)
    sliced = tl.load(_section(packed_ptr, _SAMPLE_SLICES) + t, mask=sampled, other=0)
    sample_row = tl.load(_section(packed_ptr, _SAMPLE_ROWS) + t, mask=sampled, other=0)
    begin, end = tl.load(cu + sliced, mask=sampled, other=0), tl.load(cu + sliced + 1, mask=sampled, other=1)
    length = tl.load(starts + sliced, mask=sampled, other=0) + end - begin
    in_range = t < max_samples
    tl.store(sample_indices_ptr + t, tl.where(sampled, end - 1, 0).to(tl.int64), mask=in_range)
    tl.store(sample_rows_ptr + t, tl.where(sampled, sample_row, num_rows - 1).to(tl.int64), mask=in_range)
    tl.store(sample_positions_ptr + t, tl.where(sampled, length, 0).to(tl.int64), mask=in_range)


@triton.jit
def _copy_table(
    target_ptr, block_tables_ptr, row, length, num_columns, BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Copy a context's blocks; later columns keep their values."""
    num_used = tl.cdiv(length, BLOCK_SIZE)
    for begin in range(0, num_used, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        mask = column < num_used
        tl.store(target_ptr + column, tl.load(block_tables_ptr + row * num_columns + column, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["max_tokens", "max_decodes", "max_prefills", "max_samples", "num_tiles", "search_steps"])
def _expand_plan_kernel(
    packed_ptr,
    block_tables_ptr,
    last_tokens_ptr,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    decode_lens_ptr,
    decode_tables_ptr,
    prefill_starts_ptr,
    prefill_lens_ptr,
    prefill_tables_ptr,
    sample_indices_ptr,
    sample_rows_ptr,
    sample_positions_ptr,
    num_rows,
    num_columns,
    max_tokens,
    max_decodes,
    max_prefills,
    max_samples,
    num_tiles,
    search_steps,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs 0 .. num_tiles - 1 expand tokens and samples, then one per decode slice, then prefill slices."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    program = tl.program_id(0)
    if program < num_tiles:
        _expand_tokens(
            packed_ptr, block_tables_ptr, last_tokens_ptr, input_ids_ptr, positions_ptr, slots_ptr,
            sample_indices_ptr, sample_rows_ptr, sample_positions_ptr,
            program, num_rows, num_columns, max_tokens, max_samples, search_steps, BLOCK_SIZE, TOKENS,
        )  # fmt: skip
    else:
        num_slices, num_decodes = tl.load(packed_ptr + _NUM_SLICES), tl.load(packed_ptr + _NUM_DECODES)
        rows, starts, cu = _section(packed_ptr, _ROWS), _section(packed_ptr, _STARTS), _section(packed_ptr, _CU_SEQLENS)
        decode, prefill = program - num_tiles, program - num_tiles - max_decodes
        if prefill < 0:
            length = 0
            if decode < num_decodes:
                length = tl.load(starts + decode) + 1
                row = tl.load(rows + decode).to(tl.int64)
                target = decode_tables_ptr + decode.to(tl.int64) * num_columns
                _copy_table(target, block_tables_ptr, row, length, num_columns, BLOCK_SIZE, COLUMNS)
            tl.store(decode_lens_ptr + decode, length)
        else:
            begin, length = tl.load(packed_ptr + _NUM_TOKENS), 0
            index = num_decodes + prefill
            if index < num_slices:
                begin = tl.load(cu + index)
                length = tl.load(starts + index) + tl.load(cu + index + 1) - begin
                row = tl.load(rows + index).to(tl.int64)
                target = prefill_tables_ptr + prefill.to(tl.int64) * num_columns
                _copy_table(target, block_tables_ptr, row, length, num_columns, BLOCK_SIZE, COLUMNS)
            tl.store(prefill_starts_ptr + prefill, begin)  # the last program stores the step's end
            if prefill < max_prefills:
                tl.store(prefill_lens_ptr + prefill, length)


@triton.jit(do_not_specialize=["num_samples"])
def _store_tokens_kernel(
    tokens_ptr,
    rows_ptr,
    packed_ptr,
    last_tokens_ptr,
    ring_ptr,
    stride_turn,
    num_samples,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Store a block of samples, per row and in the ring."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < num_samples
    token, row = tl.load(tokens_ptr + k, mask=mask, other=0), tl.load(rows_ptr + k, mask=mask, other=0)
    tl.store(last_tokens_ptr + row, tl.maximum(token, 0), mask=mask)
    tl.store(ring_ptr + tl.load(packed_ptr + _TURN) * stride_turn + k, token, mask=mask)


def apply_plan_triton(packed: torch.Tensor, state: RowState) -> None:
    """As `apply_plan_ref`."""
    tables, sampling = state.block_tables, state.sampling
    params = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seed)
    launch_kernel(
        _apply_plan_kernel,
        (1,),
        (packed, tables, *params, tables.stride(0)),
        BLOCK=_CHANGES,
        num_warps=8,
        **pdl_launch(packed),
    )


def expand_plan_triton(packed: torch.Tensor, state: RowState, block_size: int, out: StepTensors) -> None:
    """As `expand_plan_ref`."""
    num_tokens, num_samples = len(out.input_ids), len(out.sample_rows)
    num_decodes, num_prefills = len(out.decode_lens), len(out.prefill_lens)
    num_tiles = triton.cdiv(max(num_tokens, num_samples), _TOKENS)
    num_rows, num_columns = state.block_tables.shape
    for name in ("decode_tables", "prefill_tables"):
        if getattr(out, name).stride(0) != state.block_tables.stride(0):
            raise ValueError(f"{name} has row stride {getattr(out, name).stride(0)}, the block tables {num_columns}")
    constants: dict[str, Any] = {"BLOCK_SIZE": block_size, "TOKENS": _TOKENS, "COLUMNS": _COLUMNS}
    search_steps = (num_decodes + num_prefills).bit_length()
    counts = (num_tokens, num_decodes, num_prefills, num_samples, num_tiles, search_steps)
    launch_kernel(
        _expand_plan_kernel,
        (num_tiles + num_decodes + num_prefills + 1,),
        (packed, state.block_tables, state.last_tokens, *out, num_rows, num_columns, *counts),
        **constants,
        **pdl_launch(packed),
    )


def store_tokens_triton(
    tokens: torch.Tensor, rows: torch.Tensor, packed: torch.Tensor, last_tokens: torch.Tensor, ring: torch.Tensor
) -> None:
    """As `store_tokens_ref`. Padding may write the last row repeatedly; it is never read."""
    launch: dict[str, Any] = {"BLOCK": 256, **pdl_launch(packed)}
    launch_kernel(
        _store_tokens_kernel,
        (triton.cdiv(len(tokens), 256),),
        (tokens, rows, packed, last_tokens, ring, ring.stride(0), len(tokens)),
        **launch,
    )
