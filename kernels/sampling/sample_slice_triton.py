"""Triton kernels of sample_slice.py: the best token of a slice of the vocabulary, and the best of all slices.

Legend: K rows, V tokens of a slice, P parts of a row, each of every P-th chunk, R ranks.

    choose    grid [P, K]   (score, token) of a part's best, as in sample_triton.py
    join      grid [K]      the best of the parts, as a key
    winners   grid [K / B]  the token of the highest key of B rows
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .params import SamplingRows
from .sample_triton import (
    NUM_WARPS,
    PROGRAMS,
    best_of_parts,
    choose_logit,
    choose_perturbed,
    chunk_size,
    num_programs,
    padded_parts,
)

WINNERS_BLOCK = 128


@triton.jit
def _slice_choose_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    seed_ptr,
    score_ptr,
    token_ptr,
    stride_row,
    slice_size,
    first_token,
    num_chunks,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, k) finds the best token in every P-th chunk of row k's slice."""
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    row_ptr, part = logits_ptr + k * stride_row, k * tl.num_programs(0) + tl.program_id(0)
    if temperature == 0.0:
        choose_logit(row_ptr, score_ptr, token_ptr, part, slice_size, num_chunks, CHUNK)
    else:
        seed, position = tl.load(seed_ptr + row), tl.load(positions_ptr + k)
        choose_perturbed(
            row_ptr, score_ptr, token_ptr, part, temperature, seed, position, first_token // 4, 0.0, 0.0, slice_size,
            num_chunks, False, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def _slice_join_kernel(
    rows_ptr, score_ptr, token_ptr, key_ptr, first_token, num_parts, PARTS: tl.constexpr, PDL: tl.constexpr
):
    """Program k reduces the parts of row k to one key."""
    k = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    unusable = tl.full((), 0x7FFFFFFF, tl.int64) << 32
    if tl.load(rows_ptr + k) < 0:
        tl.store(key_ptr + k, unusable)
        return
    best, token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    bits = tl.where(best == 0.0, 0.0, best).to(tl.int32, bitcast=True)  # -0 becomes +0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key = (ordered << 32) + (0x7FFFFFFF - first_token - token).to(tl.int64)
    tl.store(key_ptr + k, tl.where(token < 0, unusable, key))


@triton.jit(do_not_specialize=["num_rows"])
def _winners_kernel(key_ptr, out_ptr, num_rows, num_ranks, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Program p takes the token of the highest key over ranks, for rows p * BLOCK .."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    wait_for_inputs(PDL)
    release_dependents(PDL)
    highest = tl.load(key_ptr + rows, mask=mask, other=0)
    for rank in range(1, num_ranks):
        highest = tl.maximum(highest, tl.load(key_ptr + rank * num_rows + rows, mask=mask, other=0))
    score, token = (highest >> 32).to(tl.int32), 0x7FFFFFFF - (highest & 0x7FFFFFFF)
    nothing = (score == 0x7FFFFFFF) | (score == -2139095041)  # an unusable row, or one whose best is -inf
    tl.store(out_ptr + rows, tl.where(nothing, -1, token), mask=mask)


def best_keys_triton(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor, first_token: int
) -> torch.Tensor:
    """`sample_slice.best_keys` for checked arguments."""
    num_rows, slice_size = logits.shape
    keys = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return keys
    chunk = chunk_size(num_rows)
    num_chunks = max(-(-slice_size // chunk), 1)
    num_parts = num_programs(num_rows, num_chunks, PROGRAMS)
    scores = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    sizes = (logits.stride(0), slice_size, first_token, num_chunks)
    launch_kernel(
        _slice_choose_kernel,
        (num_parts, num_rows),
        (logits, rows, positions, params.temperature, params.seed, scores, tokens, *sizes),
        CHUNK=chunk,
        num_warps=NUM_WARPS,
        **pdl_launch(logits),
    )
    launch_kernel(
        _slice_join_kernel,
        (num_rows,),
        (rows, scores, tokens, keys, first_token, num_parts),
        PARTS=padded_parts(num_rows, num_chunks),
        num_warps=1,
        **pdl_launch(logits),
    )
    return keys


def winners_triton(keys: torch.Tensor) -> torch.Tensor:
    """`sample_slice.winners` for checked arguments."""
    num_ranks, num_rows = keys.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=keys.device)
    if num_rows == 0:
        return out
    launch_kernel(
        _winners_kernel,
        (triton.cdiv(num_rows, WINNERS_BLOCK),),
        (keys, out, num_rows, num_ranks),
        BLOCK=WINNERS_BLOCK,
        num_warps=4,
        **pdl_launch(keys),
    )
    return out
