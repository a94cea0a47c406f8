"""Triton kernels that bracket a row's filter cuts, for sample_limits_triton.py.

    profile   grid [P, K]   count or mass exp(z - max z) of the tokens at or above each of 16 pivots; repeated with
                            16 pivots inside the bracket, unless few tokens are left
    gather    grid [P, K]   the logits inside the bracket

Legend: K rows, V vocabulary, C chunks of CHUNK tokens, split over P programs; z = logit / temperature. Sums
are by chunk, in one order for any batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..pdl_triton import release_dependents, wait_for_inputs
from .sample_triton import best_of_parts

PIVOTS = tl.constexpr(16)


@triton.jit
def load_top_k(top_k_ptr, row, vocab_size):
    """A row's top-k, 0 where that keeps all."""
    top_k = tl.load(top_k_ptr + row)
    return tl.where(top_k < vocab_size, top_k, 0)


@triton.jit
def cuts(temperature, top_k, top_p):
    """Whether a row's cut depends on more than its maximum."""
    return (temperature != 0.0) & ((top_k > 0) | (top_p < 1.0))


@triton.jit
def inside(x, temperature, floor):
    """Tokens that min-p keeps."""
    return x * tl.div_rn(1.0, temperature) >= floor


@triton.jit
def lowest_inside(highest, temperature, min_p):
    """The lowest z that min-p keeps."""
    return highest * tl.div_rn(1.0, temperature) + tl.log(min_p)


@triton.jit
def mass_of(x, highest, temperature):
    """Unnormalised probability exp(z - max z) of logits x."""
    inverse = tl.div_rn(1.0, temperature)
    return tl.exp(x * inverse - highest * inverse)


@triton.jit
def _at(values, wanted):
    """values[wanted] of float32 [PIVOTS], 0 for -1."""
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == wanted, values, 0.0), axis=0)


@triton.jit
def _first_pivots(highest, temperature):
    """Logits whose z is 1/16, 4/16, 9/16, ... 15**2/16 below the maximum's; the last -inf."""
    distance = (tl.arange(0, PIVOTS) + 1).to(tl.float32)
    pivots = highest - temperature * (distance * distance * 0.0625)
    return tl.where(tl.arange(0, PIVOTS) == PIVOTS - 1, float("-inf"), pivots)


@triton.jit
def _second_pivots(bottom, top, temperature):
    """Logits from `top` to `bottom`; ever farther apart where `bottom` is -inf."""
    distance = (tl.arange(0, PIVOTS) + 1).to(tl.float32)
    even = top - (top - bottom) * (distance * 0.0625)
    pivots = tl.where(bottom == float("-inf"), top - temperature * (distance * distance * 0.25), even)
    return tl.where(tl.arange(0, PIVOTS) == PIVOTS - 1, bottom, pivots)


@triton.jit
def _chunk_sums(sums_ptr, k, num_chunks, CHUNKS: tl.constexpr):
    """A row's sums [PIVOTS] over its chunks."""
    chunks = tl.arange(0, CHUNKS)[:, None]
    offsets = (k * num_chunks + chunks) * PIVOTS + tl.arange(0, PIVOTS)[None, :]
    return tl.sum(tl.load(sums_ptr + offsets, mask=chunks < num_chunks, other=0.0), axis=0)


@triton.jit
def first_bracket(
    count_ptr, mass_ptr, k, num_chunks, highest, temperature, top_k, top_p, FEW: tl.constexpr, CHUNKS: tl.constexpr
):
    """(bottom, top, count, mass, total, by_k, few) of the first profile: by counts for top-k, else by masses.

    The cuts lie in [bottom, top); `count` and `mass` are those at or above `top`, `total` is all mass, if
    summed. by_k: at least top-k tokens. few: at most FEW tokens are at or above `bottom`, none above `top`.
    """
    index, last = tl.arange(0, PIVOTS), PIVOTS - 1
    pivots = _first_pivots(highest, temperature)
    none = tl.full((), 0.0, tl.float32)
    if top_k > 0:
        counts = _chunk_sums(count_ptr, k, num_chunks, CHUNKS)
        by_k = _at(counts, last) >= top_k
        low = tl.where(by_k, tl.min(tl.where(counts >= top_k, index, last), axis=0), last)
        few = _at(counts, low) <= FEW
        high = tl.where((top_p < 1.0) | few, -1, low - 1)
        count, mass, total = _at(counts, high), none, none
    else:
        masses = _chunk_sums(mass_ptr, k, num_chunks, CHUNKS)
        by_k, few = top_k > 0, top_k > 0
        total = _at(masses, last)
        low = tl.min(tl.where(masses >= top_p * total, index, last), axis=0)
        high = low - 1
        count, mass = none, _at(masses, high)
    top = tl.where(high < 0, float("inf"), _at(pivots, high))
    return _at(pivots, low), top, count, mass, total, by_k, few


@triton.jit
def bracket(
    count_ptr,
    mass_ptr,
    k,
    stride_round,
    num_chunks,
    highest,
    temperature,
    top_k,
    top_p,
    FEW: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """`first_bracket`, narrowed by the second profile unless few tokens are left."""
    bottom, top, count, mass, total, by_k, few = first_bracket(  # pyright: ignore[reportGeneralTypeIssues]
        count_ptr, mass_ptr, k, num_chunks, highest, temperature, top_k, top_p, FEW, CHUNKS
    )
    if not few:
        # Rows with top-k have counts, with top-p masses; the others are garbage.
        counts = _chunk_sums(count_ptr + stride_round, k, num_chunks, CHUNKS)
        masses = _chunk_sums(mass_ptr + stride_round, k, num_chunks, CHUNKS)
        pivots = _second_pivots(bottom, tl.minimum(top, highest), temperature)
        index, last = tl.arange(0, PIVOTS), PIVOTS - 1
        low_k = tl.where(by_k, tl.min(tl.where(counts >= top_k, index, last), axis=0), last)
        # With fewer tokens than top-k, `bottom` was -inf; all mass is summed now.
        total = tl.where((top_k > 0) & (not by_k), _at(masses, last), total)
        # Lower bound of top-p's total, the mass of the tokens that top-k keeps.
        least = tl.where(by_k, tl.where(low_k > 0, _at(masses, low_k - 1), mass), total)
        high_p = tl.min(tl.where(masses >= top_p * least, index, last), axis=0) - 1
        low_p = tl.min(tl.where(masses >= top_p * total, index, last), axis=0)
        low = tl.where(by_k, low_k, tl.where(top_p < 1.0, low_p, last))
        high = tl.where(top_p < 1.0, high_p, low_k - 1)
        if high >= 0:
            top, count, mass = _at(pivots, high), _at(counts, high), _at(masses, high)
        bottom = _at(pivots, low)
    return bottom, top, count, mass, total, by_k, few


@triton.jit
def _sums_above(
    row_ptr,
    first,
    vocab_size,
    pivots,
    highest,
    temperature,
    floor,
    BY_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURN: tl.constexpr,
):
    """Count or mass of a chunk's tokens at or above each pivot, float32 [PIVOTS]."""
    # Pivots come first: a thread holds all and computes each mass once.
    sums = tl.zeros((PIVOTS, TURN), tl.float32)
    for start in tl.static_range(0, CHUNK, TURN):
        tokens = first + start + tl.arange(0, TURN)
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("nan")).to(tl.float32)
        x = tl.where(inside(x, temperature, floor), x, float("nan"))  # NaN is above no pivot
        weight = mass_of(x, highest, temperature) if BY_MASS else tl.full((TURN,), 1.0, tl.float32)
        sums += tl.where(x[None, :] >= pivots[:, None], weight[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit(do_not_specialize=["num_parts"])
def sample_profile_kernel(
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
    stride_row,
    stride_round,
    vocab_size,
    num_parts,
    num_chunks,
    SECOND: tl.constexpr,
    FEW: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, k) sums every P-th chunk of row k above each pivot."""
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
    top_k = load_top_k(top_k_ptr, row, vocab_size)
    if not cuts(temperature, top_k, top_p):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        return
    pivots = _first_pivots(highest, temperature)
    if SECOND:
        bottom, top, _, _, _, _, few = first_bracket(
            count_ptr, mass_ptr, k, num_chunks, highest, temperature, top_k, top_p, FEW, CHUNKS
        )
        if few:
            return
        pivots = _second_pivots(bottom, tl.minimum(top, highest), temperature)
        count_ptr += stride_round
        mass_ptr += stride_round
    floor = lowest_inside(highest, temperature, tl.load(min_p_ptr + row))
    row_ptr = logits_ptr + k * stride_row
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        part, first = (k * num_chunks + chunk) * PIVOTS + tl.arange(0, PIVOTS), chunk * CHUNK
        if top_k > 0:
            counts = _sums_above(row_ptr, first, vocab_size, pivots, highest, temperature, floor, False, CHUNK, TURN)
            tl.store(count_ptr + part, counts)
        if (top_p < 1.0) & (SECOND | (top_k == 0)):
            masses = _sums_above(row_ptr, first, vocab_size, pivots, highest, temperature, floor, True, CHUNK, TURN)
            tl.store(mass_ptr + part, masses)


@triton.jit(do_not_specialize=["num_parts"])
def sample_gather_kernel(
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
    stride_row,
    stride_round,
    vocab_size,
    num_parts,
    num_chunks,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, k) collects bracketed logits from every P-th chunk of row k."""
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature, top_p = tl.load(temperature_ptr + row), tl.load(top_p_ptr + row)
    top_k = load_top_k(top_k_ptr, row, vocab_size)
    if not cuts(temperature, top_k, top_p):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        return
    bottom, top, _, _, _, _, _ = bracket(
        count_ptr, mass_ptr, k, stride_round, num_chunks, highest, temperature, top_k, top_p, CAPACITY, CHUNKS
    )
    floor = lowest_inside(highest, temperature, tl.load(min_p_ptr + row))
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        raw = tl.load(logits_ptr + k * stride_row + tokens, mask=tokens < vocab_size, other=float("-inf"))
        x = raw.to(tl.float32)
        between = (x >= bottom) & (x < top) & inside(x, temperature, floor) & (tokens < vocab_size)
        between = between.to(tl.int32)
        length = tl.sum(between, axis=0)
        tl.store(length_ptr + k * num_chunks + chunk, length)
        if length > 0:
            places = tl.cumsum(between, axis=0) - 1
            found = found_ptr + (k * num_chunks + chunk) * CAPACITY + places
            tl.store(found, raw, mask=(between > 0) & (places < CAPACITY))
