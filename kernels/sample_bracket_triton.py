"""Triton kernels that narrow down where the filters of a row cut, for sample_limits_triton.py.

    profile   grid [P, K]   how many tokens, and how much mass exp(z - max z), lie at or above each of 16 pivots; then
                            once more, with 16 pivots between the two that the cuts lie between
    gather    grid [P, K]   the logits of the tokens that are left between two pivots

Legend: K rows, V vocabulary, C chunks of CHUNK tokens in a row, dealt out to P programs; z = logit / temperature. Sums
are taken by chunk, in one order, whatever the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pdl_triton import release_dependents, wait_for_inputs
from .sample_triton import best_of_parts

PIVOTS = tl.constexpr(16)


@triton.jit
def cuts(temperature, top_k, top_p, vocab_size):
    """Whether a row's cut depends on more than its maximum."""
    return (temperature != 0.0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0))


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
    inverse = tl.div_rn(1.0, temperature)
    return tl.exp(x * inverse - highest * inverse)


@triton.jit
def _at(values, wanted):
    """values[wanted] of float32 [PIVOTS]."""
    return tl.sum(tl.where(tl.arange(0, PIVOTS) == wanted, values, 0.0), axis=0)


@triton.jit
def _first_pivots(highest, temperature):
    """Logits whose z is 1/16, 4/16, 9/16, ... 15**2/16 below the maximum's; the last -inf."""
    distance = (tl.arange(0, PIVOTS) + 1).to(tl.float32)
    pivots = highest - temperature * (distance * distance * 0.0625)
    return tl.where(tl.arange(0, PIVOTS) == PIVOTS - 1, float("-inf"), pivots)


@triton.jit
def _second_pivots(bottom, top, temperature):
    """Logits from `top` down to `bottom`, which is the last; ever farther apart where `bottom` is -inf."""
    distance = (tl.arange(0, PIVOTS) + 1).to(tl.float32)
    even = top - (top - bottom) * (distance * 0.0625)
    pivots = tl.where(bottom == float("-inf"), top - temperature * (distance * distance * 0.25), even)
    return tl.where(tl.arange(0, PIVOTS) == PIVOTS - 1, bottom, pivots)


@triton.jit
def _narrow(counts, masses, pivots, by_k, top_k, top_p, total, top, count, mass):
    """(bottom, top, count, mass): two pivots between which the cuts lie, and what is at or above `top`.

    `top` is as it was where the cuts may lie above all pivots. Counts are known of rows with top-k, masses of rows with
    top-p; without, they are garbage, and change nothing.
    """
    index, last = tl.arange(0, PIVOTS), PIVOTS - 1
    low_k = tl.where(by_k, tl.min(tl.where(counts >= top_k, index, last), axis=0), last)
    # The mass that top-p has its share of is that of the tokens top-k keeps: not known yet, but at least this.
    least = tl.where(by_k, tl.where(low_k > 0, _at(masses, low_k - 1), mass), total)
    high_p = tl.min(tl.where(masses >= top_p * least, index, last), axis=0) - 1
    low_p = tl.min(tl.where(masses >= top_p * total, index, last), axis=0)
    low = tl.where(by_k, low_k, tl.where(top_p < 1.0, low_p, last))
    high = tl.where(top_p < 1.0, high_p, low_k - 1)
    count = tl.where(high < 0, count, _at(counts, high))
    mass = tl.where(high < 0, mass, _at(masses, high))
    return _at(pivots, low), tl.where(high < 0, top, _at(pivots, high)), count, mass


@triton.jit
def _chunk_sums(sums_ptr, k, num_chunks, CHUNKS: tl.constexpr):
    """The sums [PIVOTS] of a row, of those of its chunks."""
    chunks = tl.arange(0, CHUNKS)[:, None]
    offsets = (k * num_chunks + chunks) * PIVOTS + tl.arange(0, PIVOTS)[None, :]
    return tl.sum(tl.load(sums_ptr + offsets, mask=chunks < num_chunks, other=0.0), axis=0)


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
    ROUNDS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """(bottom, top, count, mass, total, by_k): `_narrow` after ROUNDS profiles; all mass; whether top-k cuts at all."""
    counts, masses = _chunk_sums(count_ptr, k, num_chunks, CHUNKS), _chunk_sums(mass_ptr, k, num_chunks, CHUNKS)
    total = _at(masses, PIVOTS - 1)
    by_k = (top_k > 0) & (_at(counts, PIVOTS - 1) >= top_k)
    pivots = _first_pivots(highest, temperature)
    bottom, top, count, mass = _narrow(
        counts, masses, pivots, by_k, top_k, top_p, total, float("inf"), 0.0, 0.0
    )  # fmt: skip
    if ROUNDS == 2:
        counts = _chunk_sums(count_ptr + stride_round, k, num_chunks, CHUNKS)
        masses = _chunk_sums(mass_ptr + stride_round, k, num_chunks, CHUNKS)
        pivots = _second_pivots(bottom, tl.minimum(top, highest), temperature)
        bottom, top, count, mass = _narrow(counts, masses, pivots, by_k, top_k, top_p, total, top, count, mass)
    return bottom, top, count, mass, total, by_k


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
    # Pivots stand first, so that a thread holds all of them for its tokens and needs each token's mass once.
    sums = tl.zeros((PIVOTS, TURN), tl.float32)
    for start in tl.static_range(0, CHUNK, TURN):
        tokens = first + start + tl.arange(0, TURN)
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("nan")).to(tl.float32)
        x = tl.where(inside(x, temperature, floor), x, float("nan"))  # NaN is above no pivot
        weight = mass_of(x, highest, temperature) if BY_MASS else tl.full((TURN,), 1.0, tl.float32)
        sums += tl.where(x[None, :] >= pivots[:, None], weight[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
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
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if not cuts(temperature, top_k, top_p, vocab_size):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        return
    pivots = _first_pivots(highest, temperature)
    if SECOND:
        bottom, top, _, _, _, _ = bracket(
            count_ptr, mass_ptr, k, stride_round, num_chunks, highest, temperature, top_k, top_p, 1, CHUNKS
        )
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
        if top_p < 1.0:
            masses = _sums_above(row_ptr, first, vocab_size, pivots, highest, temperature, floor, True, CHUNK, TURN)
            tl.store(mass_ptr + part, masses)


@triton.jit
def sample_gather_kernel(
    logits_ptr,
    rows_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
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
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if not cuts(temperature, top_k, top_p, vocab_size):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        return
    bottom, top, _, _, _, _ = bracket(
        count_ptr, mass_ptr, k, stride_round, num_chunks, highest, temperature, top_k, top_p, 2, CHUNKS
    )
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        tokens = chunk * CHUNK + tl.arange(0, CHUNK)
        raw = tl.load(logits_ptr + k * stride_row + tokens, mask=tokens < vocab_size, other=float("-inf"))
        x = raw.to(tl.float32)
        between = ((x >= bottom) & (x < top) & (tokens < vocab_size)).to(tl.int32)
        length = tl.sum(between, axis=0)
        tl.store(length_ptr + k * num_chunks + chunk, length)
        if length > 0:
            places = tl.cumsum(between, axis=0) - 1
            found = found_ptr + (k * num_chunks + chunk) * CAPACITY + places
            tl.store(found, raw, mask=(between > 0) & (places < CAPACITY))
