"""Decode attention on a GPU: a sequence's keys are split over programs; the last joins the parts.

    part[s, h, i] = softmax over the keys of split i . V         lse[s, h, i] = log2 of the sum of 2^score
    out[s, h] = sum_i 2^(lse_i - lse) part_i                     lse = log2 of the sum of 2^lse_i      i in order

Legend as in paged_decode.py. Scores in base 2 (scale includes log2 e), sums in fp32. A program reads one kv
head of a split, block by block; its G query heads are the rows of one `tl.dot` (at least 16).

The host sets the number of launched splits; contexts read on the device set their use and length, so a
launch stays valid in a CUDA graph. Each program increments `arrivals` after its part; the last joins in
order and resets it. A single split is written directly.

Paper: Dao et al., Flash-Decoding, 2023, crfm.stanford.edu/2023/10/12/flashdecoding.html.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..ops_triton import softmax_step
from ..pdl_triton import launch_kernel, pdl_launch, release_dependents
from .tables import DecodeTables

_LOG2_E = 1 / math.log(2)
SHARED_BYTES = 220 << 10  # of one sm_90 SM, less Triton's reserve
_JOINED_AT_A_TIME = 8192  # 64 per thread of four warps
_MAX_BLOCK_BYTES = 128 << 10  # of one kv head; fp32 GEMMs need as much again


@triton.jit
def cap_scores(dots, inner, CAPPED: tl.constexpr):
    """tanh(scale * dots / softcap) as 1 - 2 / (e^2x + 1), `inner` = 2 log2(e) scale / softcap; else dots."""
    if CAPPED:
        return 1.0 - 2.0 / (tl.exp2(dots * inner) + 1.0)
    else:
        return dots


@triton.jit
def _join_splits(
    out_ptr,
    parts_ptr,
    lse_ptr,
    num_used,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Join one kv head's query heads, in order; CHUNK splits are loaded together."""
    heads, dims, offsets = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_DIM), tl.arange(0, CHUNK)
    tile = heads[:, None] * HEAD_DIM + dims[None, :]
    in_group = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    highest = tl.full([PADDED_GROUP], -1.0e30, tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    acc = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    for begin in range(0, num_used, CHUNK):
        splits = begin + offsets
        used = splits < num_used
        # Bypass L1: other SMs wrote these.
        parts = tl.load(
            parts_ptr + splits[:, None, None] * (GROUP * HEAD_DIM) + tile[None],
            mask=used[:, None, None] & in_group[None],
            other=0.0,
            cache_modifier=".cg",
        )
        lse = tl.load(
            lse_ptr + splits[:, None] * GROUP + heads[None, :],
            mask=used[:, None] & (heads < GROUP)[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )
        higher = tl.maximum(highest, tl.max(lse, 0))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(lse - higher[None, :])
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink[:, None] + tl.sum(weights[:, :, None] * parts, 0)
        highest = higher
    total = tl.where(heads < GROUP, total, 1.0)
    tl.store(out_ptr + tile, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_group)


@triton.jit
def _attend(
    q,
    tile_ptrs,
    table_ptr,
    begin,
    stop,
    context_len,
    window,
    inner,
    unit,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Online softmax over blocks begin .. stop - 1: result, sum and maximum per row."""
    ROWS: tl.constexpr = q.shape[0]
    PADDED_DIM: tl.constexpr = q.shape[1]
    slots, in_dim = tl.arange(0, BLOCK_SIZE), tl.arange(0, PADDED_DIM)[None, :] < HEAD_DIM
    # Finite: -inf minus -inf is NaN.
    highest = tl.full([ROWS], -1.0e30, tl.float32)
    totals = tl.zeros([ROWS, BLOCK_SIZE], tl.float32)  # by slot: row sums make warps wait
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    # One iteration ahead, or dependent loads lose two pipeline stages.
    block = tl.load(table_ptr + begin).to(tl.int64)
    for index in range(begin, stop):
        next_block = tl.load(table_ptr + index + 1, mask=index + 1 < stop, other=0).to(tl.int64)
        k_ptrs = tile_ptrs + block * (2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
        positions = index * BLOCK_SIZE + slots
        seen = positions < context_len
        if WINDOWED:
            seen &= positions >= context_len - window
        k = tl.load(k_ptrs, mask=in_dim, other=0.0)
        # Unseen slots may hold NaN; 0 * NaN is NaN.
        v = tl.load(k_ptrs + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM, mask=seen[:, None] & in_dim, other=0.0)
        scores = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, CAPPED)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        p, shrink, highest = softmax_step(scores, highest, unit)  # pyright: ignore[reportGeneralTypeIssues]
        totals = totals * shrink[:, None] + p
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        block = next_block
    total = tl.sum(totals, 1)
    return acc / total[:, None], total, highest


@triton.jit(do_not_specialize=["num_splits", "min_blocks", "window"])
def _paged_decode_kernel(
    out_ptr,
    parts_ptr,  # float32 [S, KV, num_splits, G, D], with SPLIT
    lse_ptr,  # float32 [S, KV, num_splits, G], with SPLIT
    arrivals_ptr,  # int32 [S, KV], with SPLIT: zeros before and after
    q_ptr,
    cache_ptr,
    context_lens_ptr,
    block_tables_ptr,
    stride_q_token,
    stride_q_head,
    stride_table,
    num_splits,
    min_blocks,
    window,
    inner,
    unit,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    JOIN_CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (kv head, sequence, split)."""
    kv_head, seq, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    context_len = tl.load(context_lens_ptr + seq)
    first = 0
    if WINDOWED:
        first = tl.maximum(context_len - window, 0) // BLOCK_SIZE
    end = tl.cdiv(context_len, BLOCK_SIZE)
    per_split = tl.maximum(tl.cdiv(end - first, num_splits), min_blocks)
    begin = first + split * per_split
    stop = tl.minimum(begin + per_split, end)
    if begin >= stop:
        return

    rows, dims, slots = tl.arange(0, ROWS), tl.arange(0, PADDED_DIM), tl.arange(0, BLOCK_SIZE)
    heads = kv_head * GROUP + rows
    in_group = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = q_ptr + seq * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
    q = tl.load(q_rows, mask=in_group, other=0.0)
    tile_ptrs = cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM) + slots[:, None] * HEAD_DIM + dims[None, :]

    release_dependents(PDL)
    acc, total, highest = _attend(  # pyright: ignore[reportGeneralTypeIssues]
        q, tile_ptrs, block_tables_ptr + seq * stride_table, begin, stop, context_len, window, inner, unit,
        NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, WINDOWED, CAPPED,
    )  # fmt: skip
    pair = seq * NUM_KV_HEADS + kv_head
    tile = rows[:, None] * HEAD_DIM + dims[None, :]
    out_ptr += pair * (GROUP * HEAD_DIM)
    num_used = tl.cdiv(end - first, per_split)
    if SPLIT:
        if num_used == 1:
            tl.store(out_ptr + tile, acc.to(out_ptr.dtype.element_ty), mask=in_group)
        else:
            parts_ptr += pair * num_splits * (GROUP * HEAD_DIM)
            lse_ptr += pair * num_splits * GROUP
            tl.store(parts_ptr + split * (GROUP * HEAD_DIM) + tile, acc, mask=in_group)
            tl.store(lse_ptr + split * GROUP + rows, highest + tl.log2(total), mask=rows < GROUP)
            tl.debug_barrier()  # one thread arrives for all, after their writes
            if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel", scope="gpu") == num_used - 1:
                _join_splits(
                    out_ptr, parts_ptr, lse_ptr, num_used, GROUP, PADDED_GROUP, HEAD_DIM, PADDED_DIM, JOIN_CHUNK
                )
                tl.store(arrivals_ptr + pair, 0)
    else:
        tl.store(out_ptr + tile, acc.to(out_ptr.dtype.element_ty), mask=in_group)


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """`inner` of `cap_scores`, and the factor from its results to base-2 scores."""
    if softcap is None:
        return 0.0, scale * _LOG2_E
    return 2 * _LOG2_E * scale / softcap, softcap * _LOG2_E


def check_operands(q: torch.Tensor, cache: torch.Tensor) -> None:
    """Raise ValueError for unsupported operands."""
    block_size = cache.shape[3]
    if not 16 <= block_size <= 128 or block_size & (block_size - 1):
        raise ValueError(f"block_size {block_size}: attention on a GPU needs 16, 32, 64 or 128")
    block_bytes = 2 * block_size * padded_dim(cache.shape[4]) * cache.element_size()
    if block_bytes > _MAX_BLOCK_BYTES:
        raise ValueError(
            f"a block of {block_size} tokens with head_dim {cache.shape[4]} in {cache.dtype} takes {block_bytes} bytes "
            f"of shared memory; an SM holds {_MAX_BLOCK_BYTES}: use a smaller block_size"
        )
    if q.dtype != cache.dtype:
        raise ValueError(f"q is {q.dtype}, the cache {cache.dtype}; they must be equal")
    if q.stride(-1) != 1 or not cache.is_contiguous():
        raise ValueError("the features of q must be adjacent in memory, and the cache contiguous")


def padded_dim(head_dim: int) -> int:
    """Features of a tile: a power of two, at least 16 for `tl.dot`."""
    return max(16, int(triton.next_power_of_2(head_dim)))


def decode_launch(block_size: int, head_dim: int, element_size: int) -> dict[str, int]:
    """Warps and pipeline stages such that three programs fit an SM."""
    block_bytes = 2 * block_size * padded_dim(head_dim) * element_size
    in_flight = min(3, max(1, SHARED_BYTES // 3 // block_bytes))
    return {"num_warps": 4 if block_bytes <= 64 << 10 else 8, "num_stages": 1 + in_flight}


def join_chunk(padded_group: int, head_dim: int) -> int:
    """Splits joined at a time."""
    return max(1, _JOINED_AT_A_TIME // (padded_group * padded_dim(head_dim)))


def paged_decode_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: DecodeTables,
    *,
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """`paged_decode` for checked shapes."""
    check_operands(q, cache)
    num_seqs, (num_heads, head_dim) = tables.num_seqs, q.shape[1:]
    _, _, num_kv_heads, block_size, _ = cache.shape
    group, num_splits = num_heads // num_kv_heads, tables.num_splits
    parts = lse = out
    if num_splits > 1:
        pairs = (num_seqs, num_kv_heads, num_splits, group)
        parts = torch.empty((*pairs, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(pairs, dtype=torch.float32, device=q.device)
    inner, unit = score_factors(scale, softcap)
    padded_group = int(triton.next_power_of_2(group))
    launch: dict[str, Any] = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "ROWS": max(16, padded_group),
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim),
        "WINDOWED": tables.window is not None,
        "CAPPED": softcap is not None,
        "SPLIT": num_splits > 1,
        "PADDED_GROUP": padded_group,
        "JOIN_CHUNK": join_chunk(padded_group, head_dim),
        **decode_launch(block_size, head_dim, q.element_size()),
        # No dependent launch: early programs crowd onto the first free SMs. Layer of an 8B model on an
        # H200, with and without: one sequence of 1k tokens 13.6 and 9.4 us; 32 of them 37.7 and 34.1; eight
        # of 8k 111 and 67.
        "PDL": pdl_launch(q)["PDL"],
    }
    strides = (q.stride(0), q.stride(1), tables.block_tables.stride(0))
    numbers = (num_splits, tables.min_blocks, tables.window or 0, inner, unit)
    launch_kernel(
        _paged_decode_kernel,
        (num_kv_heads, num_seqs, num_splits),
        (out, parts, lse, tables.arrivals, q, cache, tables.context_lens, tables.block_tables, *strides, *numbers),
        **launch,
    )
