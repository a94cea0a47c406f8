"""Prefill attention on a GPU: all slices of a step in one launch.

Legend as in paged_prefill.py. A tile's rows are BLOCK_ROWS // G tokens times the G query heads of one kv
head. A slice's last tile sees the most keys and starts first. Fully visible blocks run unmasked. On an H200
one loop that branches around the mask runs at 387 TFLOP/s instead of 492. With a third loop, for a window's
left edge, ptxas keeps no GEMM asynchronous; so windows use the masked loop alone.

Paper: Dao, FlashAttention-2, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..ops_triton import softmax_step
from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .paged_decode_triton import SHARED_BYTES, cap_scores, check_operands, padded_dim, score_factors
from .tables import PrefillTables


@triton.jit
def _find_tile(starts_ptr, num_slices, program, TOKENS: tl.constexpr):
    """Slice and tile of a program, or slice -1. Slice s has tiles from (its first token

    TOKENS) + s on.

    The last tile comes first, padding last. A binary search of 256 starts would be eight dependent loads.
    """
    first_token, last_token = tl.load(starts_ptr), tl.load(starts_ptr + num_slices)
    num_used = num_slices * 0
    for begin in range(0, num_slices, 256):
        slices = begin + tl.arange(0, 256)
        starts = tl.load(starts_ptr + slices, mask=slices < num_slices, other=1 << 30)
        num_used += tl.sum((starts < last_token).to(tl.int32), 0)
    tile = (last_token - first_token) // TOKENS + num_used - 1 - program
    index = num_slices * 0 - 1
    for begin in range(0, num_slices, 256):
        slices = begin + tl.arange(0, 256)
        starts = tl.load(starts_ptr + slices, mask=slices < num_slices, other=1 << 30)
        index += tl.sum(((starts - first_token) // TOKENS + slices <= tile).to(tl.int32), 0)
    return index, tile - index - (tl.load(starts_ptr + tl.maximum(index, 0)) - first_token) // TOKENS


@triton.jit
def _attend_blocks(
    acc,
    total,
    highest,
    q,
    positions,
    first_position,
    last_position,
    tile_ptr,
    table_ptr,
    begin,
    stop,
    window,
    inner,
    unit,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over blocks begin .. stop - 1 of the table.

    Masking is bit-neutral for a fully masked or visible block, so a row is independent of the tile's
    others.
    """
    dims, slots = tl.arange(0, q.shape[1])[None, :], tl.arange(0, BLOCK_SIZE)
    in_dim = dims < HEAD_DIM
    tile_ptrs = tile_ptr + slots[:, None] * HEAD_DIM + dims
    # One iteration ahead, or dependent loads lose two pipeline stages.
    block = tl.load(table_ptr + begin, mask=begin < stop, other=0)
    for index in tl.range(begin, stop, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        next_block = tl.load(table_ptr + index + 1, mask=index + 1 < stop, other=0)
        k_ptrs = tile_ptrs + block.to(tl.int64) * (2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM)
        v_ptrs = k_ptrs + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        k = tl.load(k_ptrs, mask=in_dim, other=0.0)
        scores = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, CAPPED)
        if MASKED:
            keys = index * BLOCK_SIZE + slots
            # Unseen slots may hold NaN; 0 * NaN is NaN.
            read = keys <= last_position
            seen = keys[None, :] <= positions[:, None]
            if WINDOWED:
                read &= keys > first_position - window
                seen &= keys[None, :] > positions[:, None] - window
            v = tl.load(v_ptrs, mask=read[:, None] & in_dim, other=0.0)
            scores = tl.where(seen, scores, float("-inf"))
        else:
            v = tl.load(v_ptrs, mask=in_dim, other=0.0)
        p, shrink, highest = softmax_step(scores, highest, unit)  # pyright: ignore[reportGeneralTypeIssues]
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        block = next_block
    return acc, total, highest


@triton.jit(do_not_specialize=["num_slices", "window"])
def _paged_prefill_kernel(
    out_ptr,
    q_ptr,
    cache_ptr,
    starts_ptr,
    context_lens_ptr,
    block_tables_ptr,
    stride_q_token,
    stride_q_head,
    stride_table,
    num_slices,
    window,
    inner,
    unit,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (kv head, tile)."""
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    kv_head = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    index, tile = _find_tile(starts_ptr, num_slices, tl.program_id(1), TOKENS)  # pyright: ignore[reportGeneralTypeIssues]
    if index < 0:
        return
    query_start = tl.load(starts_ptr + index)
    context_len = tl.load(context_lens_ptr + index)
    query_len = tl.minimum(tl.load(starts_ptr + index + 1) - query_start, context_len)
    first_token = tile * TOKENS
    if first_token >= query_len:
        return
    first_position = context_len - query_len + first_token
    last_position = tl.minimum(first_position + TOKENS, context_len) - 1

    rows, dims = tl.arange(0, BLOCK_ROWS), tl.arange(0, PADDED_DIM)
    tokens = first_token + rows // GROUP
    in_tile = ((rows < TOKENS * GROUP) & (tokens < query_len))[:, None] & (dims < HEAD_DIM)[None, :]
    q_tokens, heads = (query_start + tokens).to(tl.int64), kv_head * GROUP + rows % GROUP
    q_ptrs = q_ptr + q_tokens[:, None] * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
    q = tl.load(q_ptrs, mask=in_tile, other=0.0)
    positions = context_len - query_len + tokens
    tile_ptr = cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table_ptr = block_tables_ptr + index.to(tl.int64) * stride_table

    # Finite: -inf minus -inf is NaN.
    highest = tl.full([BLOCK_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, PADDED_DIM], tl.float32)
    begin, end = 0, last_position // BLOCK_SIZE + 1
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_SIZE
    else:
        whole = (first_position + 1) // BLOCK_SIZE
        acc, total, highest = _attend_blocks(  # pyright: ignore[reportGeneralTypeIssues]
            acc, total, highest, q, positions, first_position, last_position, tile_ptr, table_ptr, 0, whole,
            window, inner, unit, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, WINDOWED, CAPPED, STAGES, False,
        )  # fmt: skip
        begin = whole
    acc, total, highest = _attend_blocks(  # pyright: ignore[reportGeneralTypeIssues]
        acc, total, highest, q, positions, first_position, last_position, tile_ptr, table_ptr, begin, end,
        window, inner, unit, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM, WINDOWED, CAPPED, STAGES, True,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # rows beyond the slice may see nothing
    out_ptrs = out_ptr + (q_tokens[:, None] * (NUM_KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)


def prefill_launch(group: int, block_size: int, head_dim: int, element_size: int) -> dict[str, int]:
    """Tile rows, pipeline stages and warps. 128 rows on 8 warps keep wgmma busy without register spills.

    fp32 GEMMs are unrolled: above 16 rows they spill and compile for minutes.
    """
    num_rows = max(16 if element_size == 4 else 128, int(triton.next_power_of_2(group)))
    row_bytes = padded_dim(head_dim) * element_size
    num_stages = 3 if head_dim <= 128 else 2
    while num_stages > 1 and (num_rows + 2 * block_size * num_stages) * row_bytes > SHARED_BYTES:
        num_stages -= 1
    return {"BLOCK_ROWS": num_rows, "STAGES": num_stages, "num_warps": 8}


def paged_prefill_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: PrefillTables,
    *,
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """`paged_prefill` for checked shapes."""
    check_operands(q, cache)
    num_tokens, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = cache.shape
    group, num_slices = num_heads // num_kv_heads, len(tables.context_lens)
    launch: dict[str, Any] = {
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim(head_dim),
        "WINDOWED": tables.window is not None,
        "CAPPED": softcap is not None,
        **prefill_launch(group, block_size, head_dim, q.element_size()),
        **pdl_launch(q),
    }
    num_tiles = num_tokens // (launch["BLOCK_ROWS"] // group) + num_slices
    inner, unit = score_factors(scale, softcap)
    strides = (q.stride(0), q.stride(1), tables.block_tables.stride(0))
    numbers = (num_slices, tables.window or 0, inner, unit)
    launch_kernel(
        _paged_prefill_kernel,
        (num_kv_heads, num_tiles),
        (out, q, cache, tables.starts, tables.context_lens, tables.block_tables, *strides, *numbers),
        **launch,
    )
