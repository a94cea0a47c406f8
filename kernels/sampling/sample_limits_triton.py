"""Triton kernels of sample.py that find the cuts of min-p, top-k and top-p in a row without a sort.

    profile, profile, gather   sample_bracket_triton.py: the few candidate logits
    limits   grid [K]          the cuts, by search among the candidates

Legend: K rows, V vocabulary, C chunks of a row. A cut is the highest logit t such that the tokens at or
above it number top_k, or hold top_p of the mass; ties with t stay. If a chunk leaves over CAPACITY tokens,
the search reads the row itself: slow, exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .params import SamplingRows
from .sample_bracket_triton import (
    PIVOTS,
    bracket,
    cuts,
    inside,
    load_top_k,
    lowest_inside,
    mass_of,
    sample_gather_kernel,
    sample_profile_kernel,
)
from .sample_triton import best_of_parts, is_filtered, num_programs

CHUNK, TURN = 4096, 512  # tokens of a chunk, and of a comparison with the pivots
CAPACITY = 512  # of the 4096; 8 MB for 256 rows of 128,256 logits in half precision
PROGRAMS = 132 * 4
PROFILE_WARPS, GATHER_WARPS, LIMITS_WARPS = 8, 8, 8
SEARCH_WIDTH = 16  # candidates of each chunk per iteration
UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # 0 in float32


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """An int32 that orders as x. SHIFT: low bits that x's dtype leaves 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _logit(key, SHIFT: tl.constexpr):
    """The logit whose `_key` is `key`."""
    ordered = key << SHIFT
    unused: tl.constexpr = (1 << SHIFT) - 1  # pyright: ignore[reportOperatorIssue]
    bits = tl.where(key < 0, (ordered | unused) ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sums(
    found_ptr,
    stride_found,
    lengths,
    longest,
    pivots,
    bottom,
    top,
    highest,
    temperature,
    floor,
    BY_MASS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Count or mass of the candidates at or above each of `pivots` [PIVOTS]."""
    chunks, columns = tl.arange(0, CHUNKS).to(tl.int64), tl.arange(0, WIDTH)
    sums = tl.zeros((PIVOTS, CHUNKS * WIDTH), tl.float32)
    for start in range(0, longest, WIDTH):
        offsets = chunks[:, None] * stride_found + start + columns[None, :]
        mask = start + columns[None, :] < lengths[:, None]
        x = tl.load(found_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        x = tl.reshape(x, (CHUNKS * WIDTH,))
        member = tl.reshape(mask, (CHUNKS * WIDTH,)) & (x >= bottom) & (x < top) & inside(x, temperature, floor)
        weight = tl.where(member, mass_of(x, highest, temperature) if BY_MASS else 1.0, 0.0)
        sums += tl.where(_key(x, SHIFT)[None, :] >= pivots[:, None], weight[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def _search(
    found_ptr,
    stride_found,
    lengths,
    longest,
    low_key,
    high_key,
    above,
    target,
    bottom,
    top,
    highest,
    temperature,
    floor,
    BY_MASS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """The highest key in [low_key, high_key) at which `above` plus the candidates from it on reach `target`."""
    index = tl.arange(0, PIVOTS)
    low, high = low_key, high_key
    while high - low > 1:
        step = (high - low + PIVOTS - 1) // PIVOTS
        pivots = tl.minimum(low + step * (index + 1), high)
        sums = above + _sums(
            found_ptr, stride_found, lengths, longest, pivots.to(tl.int32), bottom, top, highest, temperature, floor,
            BY_MASS, CHUNKS, WIDTH, SHIFT,
        )  # fmt: skip
        reached = tl.sum(((sums >= target) & (pivots < high)).to(tl.int32), axis=0)
        low = low + step * reached
        high = tl.minimum(high, low + step)
    return low


@triton.jit(do_not_specialize=["num_parts"])
def _sample_limits_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    score_ptr,
    token_ptr,
    count_ptr,
    mass_ptr,
    found_ptr,
    length_ptr,
    limits_ptr,
    stride_row,
    stride_round,
    vocab_size,
    num_parts,
    num_chunks,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr,
    SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program k finds the lowest logit that row k's filters keep."""
    k = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_k, top_p = load_top_k(top_k_ptr, row, vocab_size), tl.load(top_p_ptr + row)
    if not is_filtered(temperature, top_k, top_p, min_p, vocab_size):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        tl.store(limits_ptr + 2 * k, float("nan"))  # keep the first pass's result
        return
    floor = lowest_inside(highest, temperature, min_p)
    tl.store(limits_ptr + 2 * k + 1, floor)
    if not cuts(temperature, top_k, top_p):
        tl.store(limits_ptr + 2 * k, float("-inf"))
        return
    bottom, top, count, mass, total, by_k, few = bracket(
        count_ptr, mass_ptr, k, stride_round, num_chunks, highest, temperature, top_k, top_p, CAPACITY, CHUNKS
    )
    chunks = tl.arange(0, CHUNKS)
    lengths = tl.load(length_ptr + k * num_chunks + chunks, mask=chunks < num_chunks, other=0)
    longest = tl.max(lengths, axis=0)
    source_ptr, stride = found_ptr + k * num_chunks * CAPACITY, CAPACITY
    if longest > CAPACITY:
        source_ptr, stride = logits_ptr + k * stride_row, CHUNK
        lengths = tl.minimum(tl.maximum(vocab_size - chunks * CHUNK, 0), CHUNK)
        longest = tl.max(lengths, axis=0)
    cut = _key(bottom, SHIFT).to(tl.int64)
    ceiling = _key(tl.minimum(top, highest), SHIFT).to(tl.int64) + 1
    if by_k:
        cut = _search(
            source_ptr, stride, lengths, longest, cut, ceiling, count, top_k.to(tl.float32),
            bottom, top, highest, temperature, floor, False, CHUNKS, WIDTH, SHIFT,
        )  # fmt: skip
    if top_p < 1.0:
        if by_k | few:
            kept = _sums(
                source_ptr, stride, lengths, longest, cut.to(tl.int32) + tl.zeros((PIVOTS,), tl.int32),
                bottom, top, highest, temperature, floor, True, CHUNKS, WIDTH, SHIFT,
            )  # fmt: skip
            total = mass + tl.max(kept, axis=0)
        cut = _search(
            source_ptr, stride, lengths, longest, cut, ceiling, mass, top_p * total,
            bottom, top, highest, temperature, floor, True, CHUNKS, WIDTH, SHIFT,
        )  # fmt: skip
    lowest = _logit(cut.to(tl.int32), SHIFT)
    # The most probable token stays even if top_p is 0. If top_k exceeds the tokens and nothing else cuts,
    # the cut is still initial.
    tl.store(limits_ptr + 2 * k, tl.minimum(lowest, highest))


def find_limits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: SamplingRows,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    most_parts: int,
) -> torch.Tensor:
    """Limits float32 [K, 2] of the filtered rows: the lowest logit that stays, and min-p's lowest z.

    scores, tokens [K, parts]: the first pass. parts <= `most_parts`, a power of two. NaN: no usable logits.
    """
    num_rows, vocab_size = logits.shape
    num_parts, num_chunks = scores.shape[1], -(-vocab_size // CHUNK)
    device = logits.device
    # By round, row and chunk. float32 holds the counts exactly.
    counts, masses = (
        torch.empty((2, num_rows, num_chunks, PIVOTS.value), dtype=torch.float32, device=device) for _ in range(2)
    )
    found = torch.empty((num_rows, num_chunks, CAPACITY), dtype=logits.dtype, device=device)
    lengths = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    limits = torch.empty((num_rows, 2), dtype=torch.float32, device=device)
    temperature, top_k, top_p, min_p, _ = params
    operands = (logits, rows, temperature, top_k, top_p, min_p, scores, tokens, counts, masses)
    grid = (num_programs(num_rows, num_chunks, PROGRAMS), num_rows)
    sizes = (logits.stride(0), counts.stride(0), vocab_size, num_parts, num_chunks)
    padded = {"PARTS": most_parts, "CHUNKS": int(triton.next_power_of_2(num_chunks))}
    padded |= {"CHUNK": CHUNK, **pdl_launch(logits)}
    for second in (False, True):
        launch_kernel(
            sample_profile_kernel,
            grid,
            (*operands, *sizes),
            SECOND=second,
            FEW=CAPACITY,
            TURN=TURN,
            num_warps=PROFILE_WARPS,
            **padded,
        )
    launch_kernel(
        sample_gather_kernel,
        grid,
        (*operands, found, lengths, *sizes),
        CAPACITY=CAPACITY,
        num_warps=GATHER_WARPS,
        **padded,
    )
    launch_kernel(
        _sample_limits_kernel,
        (num_rows,),
        (*operands, found, lengths, limits, *sizes),
        CAPACITY=CAPACITY,
        WIDTH=SEARCH_WIDTH,
        SHIFT=UNUSED_BITS[logits.dtype],
        num_warps=LIMITS_WARPS,
        **padded,
    )
    return limits
