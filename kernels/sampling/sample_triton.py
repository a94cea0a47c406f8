"""Triton kernels of sample.py: the best token of each part of a row, then of the row.

Legend: K rows, V vocabulary, P parts of a row, each of every P-th chunk.

    choose          grid [P, K]   (score, token) of a part's best: the logit (greedy and filtered rows), or the logit
                                  over the temperature plus noise
    (limits)        sample_limits_triton.py: the cuts of filtered rows
    choose inside   grid [P, K]   filtered rows again, among the tokens inside the limits
    join            grid [K]      the best of the parts

Token -1 marks a part that holds NaN or +inf. All rows pass through all launches, so one CUDA graph serves
every mixture. A row's result depends on its own logits and parameters alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..ops_triton import argmax_lowest
from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .params import SamplingRows

NUM_WARPS = 8
LARGE_CHUNK, SMALL_CHUNK = 2048, 1024  # tokens at a time; small if few rows would leave SMs idle
FEW_ROWS = 8
PROGRAMS = 132 * 8


@triton.jit
def is_filtered(temperature, top_k, top_p, min_p, vocab_size):
    """Whether a row has a filter."""
    return (temperature != 0.0) & (((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0) | (min_p > 0.0))


@triton.jit
def best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS: tl.constexpr):
    """(score, token) of a row from its parts; token -1 if any part's is, the lowest among ties."""
    parts = tl.arange(0, PARTS)
    scores = tl.load(score_ptr + k * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    tokens = tl.load(token_ptr + k * num_parts + parts, mask=parts < num_parts, other=2147483647)
    best, token = argmax_lowest(scores, tokens)  # pyright: ignore[reportGeneralTypeIssues]
    return best, tl.where(tl.min(tokens, axis=0) < 0, -1, token)


@triton.jit
def _gumbel(word):
    """Standard Gumbel noise of 32 random bits, by the formula of `sample.gumbel_noise`."""
    # 23 bits as the mantissa in [1, 2); minus 1 - 2**-24 they are the uniform, exactly.
    uniform = ((word >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    return -tl.log(-tl.log(uniform))


@triton.jit
def _better(score, token, other, other_token):
    """The higher score with its token, the first among ties."""
    return tl.where(other > score, other, score), tl.where(other > score, other_token, token)


@triton.jit
def _perturb(scaled, seed, position, first_counter, chunk, score, token, CHUNK: tl.constexpr):
    """The best (score, token) [CHUNK // 4] so far and of `scaled` [CHUNK] plus noise."""
    # Four words for four consecutive tokens; `first_counter` is the slice's first.
    counters = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    low, high = position.to(tl.int32), (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, first_counter + counters, low, high, 0)  # pyright: ignore[reportGeneralTypeIssues]
    even, odd = tl.split(tl.reshape(scaled, (CHUNK // 4, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    score, token = _better(score, token, s0 + _gumbel(w0), counters * 4)
    score, token = _better(score, token, s1 + _gumbel(w1), counters * 4 + 1)
    score, token = _better(score, token, s2 + _gumbel(w2), counters * 4 + 2)
    return _better(score, token, s3 + _gumbel(w3), counters * 4 + 3)


@triton.jit
def _store_best(score_ptr, token_ptr, part, scores, tokens, unusable):
    """Store the argmax of a part; token -1 where any logit is NaN or +inf."""
    best, token = argmax_lowest(scores, tokens)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(score_ptr + part, best)
    tl.store(token_ptr + part, tl.where(tl.max(unusable, axis=0) > 0, -1, token))


@triton.jit
def _load_chunk(row_ptr, chunk, vocab_size, CHUNK: tl.constexpr):
    """Logits of one chunk in fp32, -inf beyond the vocabulary."""
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def choose_logit(row_ptr, score_ptr, token_ptr, part, vocab_size, num_chunks, CHUNK: tl.constexpr):
    """Stores the best logit of this program's part."""
    columns = tl.arange(0, CHUNK)
    scores, best = tl.full((CHUNK,), float("-inf"), tl.float32), columns
    unusable = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        x = _load_chunk(row_ptr, chunk, vocab_size, CHUNK)
        unusable |= (x < float("inf")).to(tl.int32) ^ 1  # not below infinity: NaN, +inf
        scores, best = _better(scores, best, x, chunk * CHUNK + columns)
    _store_best(score_ptr, token_ptr, part, scores, best, unusable)


@triton.jit
def choose_perturbed(
    row_ptr,
    score_ptr,
    token_ptr,
    part,
    temperature,
    seed,
    position,
    first_counter,
    lowest,
    floor,
    vocab_size,
    num_chunks,
    FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stores the best perturbed logit of this program's part, FILTERED: inside the limits."""
    inverse = tl.div_rn(1.0, temperature)
    scores, best = tl.full((CHUNK // 4,), float("-inf"), tl.float32), tl.zeros((CHUNK // 4,), tl.int32)
    unusable = tl.zeros((CHUNK,), tl.int32)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        x = _load_chunk(row_ptr, chunk, vocab_size, CHUNK)
        if FILTERED:
            inside = (x >= lowest) & (x * inverse >= floor)
            if tl.max(inside.to(tl.int32), axis=0) > 0:  # most chunks keep no token
                scaled = tl.where(inside, x * inverse, float("-inf"))
                scores, best = _perturb(scaled, seed, position, first_counter, chunk, scores, best, CHUNK)
        else:
            unusable |= (x < float("inf")).to(tl.int32) ^ 1
            scores, best = _perturb(x * inverse, seed, position, first_counter, chunk, scores, best, CHUNK)
    _store_best(score_ptr, token_ptr, part, scores, best, unusable)


@triton.jit
def _sample_choose_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    limits_ptr,
    score_ptr,
    token_ptr,
    stride_row,
    vocab_size,
    num_chunks,
    FILTERED: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, k) finds the best token in every P-th chunk of row k."""
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(rows_ptr + k)
    if row < 0:
        return
    temperature = tl.load(temperature_ptr + row)
    top_k, top_p, min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    filtered = is_filtered(temperature, top_k, top_p, min_p, vocab_size)
    seed, position = tl.load(seed_ptr + row), tl.load(positions_ptr + k)
    row_ptr, part = logits_ptr + k * stride_row, k * tl.num_programs(0) + tl.program_id(0)
    if FILTERED:
        if not filtered:
            return
        lowest, floor = tl.load(limits_ptr + 2 * k), tl.load(limits_ptr + 2 * k + 1)
        if lowest != lowest:
            return
        choose_perturbed(
            row_ptr, score_ptr, token_ptr, part, temperature, seed, position, 0, lowest, floor, vocab_size, num_chunks,
            True, CHUNK,
        )  # fmt: skip
    elif (temperature == 0.0) | filtered:
        choose_logit(row_ptr, score_ptr, token_ptr, part, vocab_size, num_chunks, CHUNK)
    else:
        choose_perturbed(
            row_ptr, score_ptr, token_ptr, part, temperature, seed, position, 0, 0.0, 0.0, vocab_size, num_chunks,
            False, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def _sample_join_kernel(
    rows_ptr, score_ptr, token_ptr, out_ptr, num_parts, PARTS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Program k reduces the parts of row k to its token."""
    k = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    if tl.load(rows_ptr + k) < 0:
        tl.store(out_ptr + k, tl.full((), -1, tl.int64))
        return
    best, token = best_of_parts(score_ptr, token_ptr, k, num_parts, PARTS)
    tl.store(out_ptr + k, tl.where(best == float("-inf"), -1, token).to(tl.int64))


def chunk_size(num_rows: int) -> int:
    """Tokens of a row that a program handles at a time."""
    return SMALL_CHUNK if num_rows <= FEW_ROWS else LARGE_CHUNK


def num_programs(num_rows: int, num_chunks: int, programs: int) -> int:
    """Enough programs per row to fill the device."""
    return min(max(programs // num_rows, 1), num_chunks)


def padded_parts(num_rows: int, num_chunks: int) -> int:
    """PARTS of all batches of one chunk size: few variants to compile."""
    fewest = 1 if num_rows <= FEW_ROWS else FEW_ROWS + 1
    return int(triton.next_power_of_2(num_programs(fewest, num_chunks, PROGRAMS)))


def sample_rows_triton(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor
) -> torch.Tensor:
    """`sample.sample_rows` for checked arguments."""
    from .sample_limits_triton import find_limits

    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    chunk = chunk_size(num_rows)
    num_chunks = -(-vocab_size // chunk)
    num_parts = num_programs(num_rows, num_chunks, PROGRAMS)
    scores = torch.empty((num_rows, num_parts), dtype=torch.float32, device=logits.device)
    tokens = torch.empty((num_rows, num_parts), dtype=torch.int32, device=logits.device)
    limits = scores  # not read by the first launch
    for filtered in (False, True):
        if filtered:
            limits = find_limits(logits, rows, params, scores, tokens, padded_parts(num_rows, num_chunks))
        launch_kernel(
            _sample_choose_kernel,
            (num_parts, num_rows),
            (logits, rows, positions, *params, limits, scores, tokens, logits.stride(0), vocab_size, num_chunks),
            FILTERED=filtered,
            CHUNK=chunk,
            num_warps=NUM_WARPS,
            **pdl_launch(logits),
        )
    launch_kernel(
        _sample_join_kernel,
        (num_rows,),
        (rows, scores, tokens, out, num_parts),
        PARTS=padded_parts(num_rows, num_chunks),
        num_warps=1,
        **pdl_launch(logits),
    )
    return out
