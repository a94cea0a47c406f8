"""Triton kernels of score.py: each chunk's share of log-sum-exp and rank, then their sum.

Legend: P rows, V vocabulary, C chunks of CHUNK tokens in a row, summed in one order for any P. SLICE:
`chosen_ptr` holds the chosen token's logit (maybe another slice's) instead of its id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs

CHUNK, NUM_WARPS = 4096, 8


@triton.jit
def _chosen_logit(row_ptr, chosen_ptr, p, SLICE: tl.constexpr):
    """The chosen token's logit in row p: given, or read by its id."""
    if SLICE:
        return tl.load(chosen_ptr + p)
    else:
        return tl.load(row_ptr + tl.maximum(tl.load(chosen_ptr + p), 0)).to(tl.float32)


@triton.jit
def _score_chunks_kernel(
    logits_ptr,
    chosen_ptr,
    highest_ptr,
    mass_ptr,
    above_ptr,
    stride_row,
    vocab_size,
    CHUNK: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (c, p) computes maximum, mass and rank share of chunk c of row p."""
    p = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row_ptr = logits_ptr + p * stride_row
    x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
    chosen = _chosen_logit(row_ptr, chosen_ptr, p, SLICE)
    highest = tl.max(x, axis=0)
    # A chunk of -inf alone has no mass; subtracting its maximum would give NaN.
    mass = tl.sum(tl.exp(x - tl.where(highest == float("-inf"), 0.0, highest)), axis=0)
    part = p * tl.num_programs(0) + tl.program_id(0)
    tl.store(highest_ptr + part, highest)
    tl.store(mass_ptr + part, mass)
    tl.store(above_ptr + part, tl.sum((x > chosen).to(tl.int32), axis=0))


@triton.jit
def _score_join_kernel(
    logits_ptr,
    chosen_ptr,
    highest_ptr,
    mass_ptr,
    above_ptr,
    logprob_ptr,
    total_ptr,
    rank_ptr,
    stride_row,
    num_chunks,
    CHUNKS: tl.constexpr,
    SLICE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p combines the chunks of row p into log-probability, log-sum-exp and rank."""
    p = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    parts, mask = p * num_chunks + chunks, chunks < num_chunks
    wait_for_inputs(PDL)
    release_dependents(PDL)
    highest = tl.load(highest_ptr + parts, mask=mask, other=float("-inf"))
    mass = tl.load(mass_ptr + parts, mask=mask, other=0.0)
    peak = tl.max(highest, axis=0)
    above = tl.sum(tl.load(above_ptr + parts, mask=mask, other=0), axis=0)
    # As for a chunk of -inf alone.
    scale = tl.where(peak == float("-inf"), 0.0, peak) if SLICE else peak
    total = scale + tl.log(tl.sum(mass * tl.exp(highest - scale), axis=0))
    chosen = _chosen_logit(logits_ptr + p * stride_row, chosen_ptr, p, SLICE)
    tl.store(logprob_ptr + p, chosen - total)
    tl.store(total_ptr + p, total)
    tl.store(rank_ptr + p, above.to(tl.int64) + 1)


def score_triton(logits: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs, log-sum-exps, ranks) of `score.score`'s checked arguments, each [P]."""
    return _score(logits, token_ids, sliced=False)


def score_slice_triton(logits: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exps, tokens above) of `score.score_slice`'s checked arguments, each [P]."""
    _, totals, ranks = _score(logits, chosen, sliced=True)
    return totals, ranks - 1


def _score(
    logits: torch.Tensor, chosen: torch.Tensor, *, sliced: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    num_chunks, device = -(-vocab_size // CHUNK), logits.device
    logprobs, totals = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(2))
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return logprobs, totals, ranks
    highest, mass = (torch.empty((num_rows, num_chunks), dtype=torch.float32, device=device) for _ in range(2))
    above = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
    launch_kernel(
        _score_chunks_kernel,
        (num_chunks, num_rows),
        (logits, chosen, highest, mass, above, logits.stride(0), vocab_size),
        CHUNK=CHUNK,
        SLICE=sliced,
        num_warps=NUM_WARPS,
        **pdl_launch(logits),
    )
    launch_kernel(
        _score_join_kernel,
        (num_rows,),
        (logits, chosen, highest, mass, above, logprobs, totals, ranks, logits.stride(0), num_chunks),
        CHUNKS=int(triton.next_power_of_2(num_chunks)),
        SLICE=sliced,
        num_warps=1,
        **pdl_launch(logits),
    )
    return logprobs, totals, ranks
