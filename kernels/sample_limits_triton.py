"""Where min-p, top-k and top-p cut a row, found without a sort: Triton kernels of sample.py for filtered rows.

    profile    grid [C, K]   how many tokens, and how much mass exp(z - max z), lie at or above each of 16 pivots
    gather     grid [C, K]   the pivots between which the cuts lie, and the logits of the tokens between them
    limits     grid [K]      the cuts themselves, by search among the gathered ones

Legend: K rows, V vocabulary, C chunks of CHUNK tokens in a row; z = logit / temperature. Both cuts are of one form: the
highest logit t such that the tokens at or above it number top_k, or hold top_p of the mass. So all that tie with t
stay. Pivots begin just below the maximum and grow apart. Sums are taken over chunks of one size in one order, whatever
the batch. Where more than CAPACITY tokens of a chunk lie between the pivots (most logits equal), the search reads the
row itself: slow, and as exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .pdl_triton import pdl_launch, release_dependents, wait_for_inputs
from .sample_triton import best_of_parts, is_filtered

if TYPE_CHECKING:
    from .sample import SamplingRows

PIVOTS = tl.constexpr(16)
CHUNK, CAPACITY, TURN = 4096, 1024, 512
PROFILE_WARPS, GATHER_WARPS, LIMITS_WARPS = 8, 8, 16
SEARCH_WIDTH = 16  # candidates of each chunk that one turn of the search looks at


@triton.jit
def _cuts(temperature, top_k, top_p, vocab_size):
    """Whether a row's cut depends on more than its maximum."""
    return (temperature != 0.0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0))


@triton.jit
def _pivot(highest, temperature, index):
    """Logit of pivot `index`: (index + 1)**2 / 16 below the maximum in units of z, the last -inf; +inf for -1."""
    distance = (index + 1).to(tl.float32)
    pivot = highest - temperature * (distance * distance * 0.0625)
    pivot = tl.where(index == PIVOTS - 1, float("-inf"), pivot)
    return tl.where(index < 0, float("inf"), pivot)


@triton.jit
def _inside(x, temperature, floor):
    """Tokens that min-p keeps."""
    return x * tl.div_rn(1.0, temperature) >= floor


@triton.jit
def _floor(highest, temperature, min_p):
    return highest * tl.div_rn(1.0, temperature) + tl.log(min_p)


@triton.jit
def _mass(x, highest, temperature):
    inverse = tl.div_rn(1.0, temperature)
    return tl.exp(x * inverse - highest * inverse)


@triton.jit
def _sums_above(
    row_ptr,
    first,
    vocab_size,
    highest,
    temperature,
    floor,
    BY_MASS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURN: tl.constexpr,
):
    """Count or mass of a chunk's tokens at or above each pivot, float32 [PIVOTS]."""
    # Pivots stand first, so that a thread holds all of them for its tokens and needs each token's mass once.
    pivots = _pivot(highest, temperature, tl.arange(0, PIVOTS))[:, None]
    sums = tl.zeros((PIVOTS, TURN), tl.float32)
    for start in tl.static_range(0, CHUNK, TURN):
        tokens = first + start + tl.arange(0, TURN)
        x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("nan")).to(tl.float32)
        x = tl.where(_inside(x, temperature, floor), x, float("nan"))  # NaN is above no pivot
        weight = _mass(x, highest, temperature) if BY_MASS else tl.full((TURN,), 1.0, tl.float32)
        sums += tl.where(x[None, :] >= pivots, weight[None, :], 0.0)
    return tl.sum(sums, axis=1)


@triton.jit
def _profile_kernel(
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
    vocab_size,
    num_parts,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    TURN: tl.constexpr,
    PDL: tl.constexpr,
):
    chunk, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if not _cuts(temperature, top_k, top_p, vocab_size):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        return
    floor = _floor(highest, temperature, tl.load(min_p_ptr + row))
    part = (k * tl.num_programs(0) + chunk) * PIVOTS + tl.arange(0, PIVOTS)
    row_ptr = logits_ptr + k * stride_row
    if top_k > 0:
        sums = _sums_above(row_ptr, chunk * CHUNK, vocab_size, highest, temperature, floor, False, CHUNK, TURN)
        tl.store(count_ptr + part, sums)
    if top_p < 1.0:
        sums = _sums_above(row_ptr, chunk * CHUNK, vocab_size, highest, temperature, floor, True, CHUNK, TURN)
        tl.store(mass_ptr + part, sums)


@triton.jit
def _at(values, index, wanted):
    """values[wanted], 0 for -1."""
    return tl.sum(tl.where(index == wanted, values, 0.0), axis=0)


@triton.jit
def _bracket(count_ptr, mass_ptr, k, num_chunks, top_k, top_p, CHUNKS: tl.constexpr):
    """(low, high, count, mass, total, by_k): pivots below and above all cuts, what lies above `high`, and all mass.

    Counts are known of rows with top-k, masses of rows with top-p; without, they are garbage, and nobody asks.
    """
    index, chunks = tl.arange(0, PIVOTS), tl.arange(0, CHUNKS)
    offsets = (k * num_chunks + chunks[:, None]) * PIVOTS + index[None, :]
    counts = tl.sum(tl.load(count_ptr + offsets, mask=(chunks < num_chunks)[:, None], other=0.0), axis=0)
    masses = tl.sum(tl.load(mass_ptr + offsets, mask=(chunks < num_chunks)[:, None], other=0.0), axis=0)
    last: tl.constexpr = PIVOTS - 1
    by_k = (top_k > 0) & (_at(counts, index, last) >= top_k)
    low_k = tl.where(by_k, tl.min(tl.where(counts >= top_k, index, last), axis=0), last)
    # The mass that top-p has its share of is that of the tokens top-k keeps: not known yet, but between these two.
    total = _at(masses, index, last)
    least = tl.where(by_k, _at(masses, index, low_k - 1), total)
    high_p = tl.min(tl.where(masses >= top_p * least, index, last), axis=0) - 1
    low_p = tl.min(tl.where(masses >= top_p * total, index, last), axis=0)
    low = tl.where(by_k, low_k, tl.where(top_p < 1.0, low_p, last))
    high = tl.where(top_p < 1.0, high_p, low_k - 1)
    return low, high, _at(counts, index, high), _at(masses, index, high), total, by_k


@triton.jit
def _gather_kernel(
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
    vocab_size,
    num_parts,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):
    chunk, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature, top_k, top_p = tl.load(temperature_ptr + row), tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if not _cuts(temperature, top_k, top_p, vocab_size):
        return
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    raw = tl.load(logits_ptr + k * stride_row + tokens, mask=tokens < vocab_size, other=float("-inf"))
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        return
    num_chunks = tl.num_programs(0)
    low, high, _, _, _, _ = _bracket(count_ptr, mass_ptr, k, num_chunks, top_k, top_p, CHUNKS)
    x = raw.to(tl.float32)
    between = (x >= _pivot(highest, temperature, low)) & (x < _pivot(highest, temperature, high))
    between = between & (tokens < vocab_size)
    places = tl.cumsum(between.to(tl.int32), axis=0) - 1
    part = k * num_chunks + chunk
    tl.store(found_ptr + part * CAPACITY + places, raw, mask=between & (places < CAPACITY))
    tl.store(length_ptr + part, tl.sum(between.to(tl.int32), axis=0))


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """A number of int32 that orders as x does. SHIFT: the low bits that no x of its dtype uses."""
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
    """Count or mass of the candidates whose key is at or above each of `pivots` [PIVOTS]."""
    chunks, columns = tl.arange(0, CHUNKS).to(tl.int64), tl.arange(0, WIDTH)
    sums = tl.zeros((PIVOTS, CHUNKS * WIDTH), tl.float32)
    for start in range(0, longest, WIDTH):
        offsets = chunks[:, None] * stride_found + start + columns[None, :]
        mask = start + columns[None, :] < lengths[:, None]
        x = tl.load(found_ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
        x = tl.reshape(x, (CHUNKS * WIDTH,))
        member = tl.reshape(mask, (CHUNKS * WIDTH,)) & (x >= bottom) & (x < top) & _inside(x, temperature, floor)
        weight = tl.where(member, _mass(x, highest, temperature) if BY_MASS else 1.0, 0.0)
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
    """The highest key in [low_key, high_key) with `above` and the candidates from it on together reaching `target`."""
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


@triton.jit
def _limits_kernel(
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
    k = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature, min_p = tl.load(temperature_ptr + row), tl.load(min_p_ptr + row)
    top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    if not is_filtered(temperature, top_k, top_p, min_p, vocab_size):
        return
    highest, best_token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    if best_token < 0:
        tl.store(limits_ptr + 2 * k, float("nan"))  # what the first pass found stands
        return
    floor = _floor(highest, temperature, min_p)
    tl.store(limits_ptr + 2 * k + 1, floor)
    if not _cuts(temperature, top_k, top_p, vocab_size):
        tl.store(limits_ptr + 2 * k, float("-inf"))
        return
    low, high, count, mass, total, by_k = _bracket(count_ptr, mass_ptr, k, num_chunks, top_k, top_p, CHUNKS)
    bottom, top = _pivot(highest, temperature, low), _pivot(highest, temperature, high)
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
        kept = _sums(
            source_ptr, stride, lengths, longest, cut.to(tl.int32) + tl.zeros((PIVOTS,), tl.int32),
            bottom, top, highest, temperature, floor, True, CHUNKS, WIDTH, SHIFT,
        )  # fmt: skip
        total = mass + tl.max(kept, axis=0)
    if top_p < 1.0:
        cut = _search(
            source_ptr, stride, lengths, longest, cut, ceiling, mass, top_p * total,
            bottom, top, highest, temperature, floor, True, CHUNKS, WIDTH, SHIFT,
        )  # fmt: skip
    # The likeliest always stays, also where top_p is 0 and nothing needs to be reached.
    tl.store(limits_ptr + 2 * k, tl.minimum(_logit(cut.to(tl.int32), SHIFT), highest))


def find_limits(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: SamplingRows,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    limits: torch.Tensor,
) -> None:
    """Writes limits float32 [K, 2] of the filtered rows: the lowest logit that stays, and min-p's lowest z.

    scores, tokens [K, parts]: the first pass, whose best is the row's maximum. A row without usable logits gets NaN.
    """
    num_rows, vocab_size = logits.shape
    num_parts, num_chunks = scores.shape[1], -(-vocab_size // CHUNK)
    padded = {"PARTS": int(triton.next_power_of_2(num_parts)), "CHUNK": CHUNK}
    device = logits.device
    # Counts are whole numbers that float32 holds exactly.
    counts = torch.empty((num_rows, num_chunks, PIVOTS.value), dtype=torch.float32, device=device)
    masses = torch.empty((num_rows, num_chunks, PIVOTS.value), dtype=torch.float32, device=device)
    found = torch.empty((num_rows, num_chunks, CAPACITY), dtype=logits.dtype, device=device)
    lengths = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    temperature, top_k, top_p, min_p, _ = params
    _profile_kernel[(num_chunks, num_rows)](
        logits, rows, temperature, top_k, top_p, min_p, scores, tokens, counts, masses,
        logits.stride(0), vocab_size, num_parts,
        **padded, TURN=TURN, num_warps=PROFILE_WARPS, **pdl_launch(logits),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    padded |= {"CHUNKS": int(triton.next_power_of_2(num_chunks)), "CAPACITY": CAPACITY}
    _gather_kernel[(num_chunks, num_rows)](
        logits, rows, temperature, top_k, top_p, scores, tokens, counts, masses, found, lengths,
        logits.stride(0), vocab_size, num_parts,
        **padded, num_warps=GATHER_WARPS, **pdl_launch(logits),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    _limits_kernel[(num_rows,)](
        logits, rows, temperature, top_k, top_p, min_p, scores, tokens, counts, masses, found, lengths, limits,
        logits.stride(0), vocab_size, num_parts, num_chunks,
        **padded, WIDTH=SEARCH_WIDTH, SHIFT={torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}[logits.dtype],
        num_warps=LIMITS_WARPS, **pdl_launch(logits),  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
