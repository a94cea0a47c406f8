"""Prefill attention on a GPU: all slices of a step in one launch.

Legend as in paged_prefill.py. The rows of a tile are tokens times the G query heads of one kv head: BLOCK_ROWS // G
tokens, so that a block of keys is read once for all of them and the diagonal is short. The step's tiles are numbered
slice after slice; a program finds its slice by bisection over the starts, and the last tile of a slice, which sees
the most keys, starts first. Blocks that every row sees whole come without a mask, between those at the left edge of
a window and those at the diagonal.

No value comes back to the host. Called by paged_prefill.py. Paper: Dao, FlashAttention-2, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .paged_decode_triton import SHARED_BYTES, cap_scores, check_operands, padded_dim, score_factors
from .paged_prefill import PrefillTables
from .pdl_triton import pdl_launch, release_dependents, wait_for_inputs


@triton.jit
def _find_slice(starts_ptr, prefill_start, num_slices, tile, TOKENS: tl.constexpr):
    """The slice of a tile. Slice s has tiles from (its first token // TOKENS) + s on: enough for its last tokens.

    All starts are compared at once: to halve the range eight times would be eight loads that wait for each other.
    """
    index = num_slices * 0 - 1
    for begin in range(0, num_slices, 256):
        slices = begin + tl.arange(0, 256)
        starts = tl.load(starts_ptr + slices, mask=slices < num_slices, other=1 << 30)
        index += tl.sum(((starts - prefill_start) // TOKENS + slices <= tile).to(tl.int32), 0)
    return index


@triton.jit
def _load_blocks(table_ptr, turn, num_blocks, PAIRS: tl.constexpr):
    """The blocks of a turn, one or two; 0 beyond the context."""
    if PAIRS:
        first = tl.load(table_ptr + turn * 2, mask=turn * 2 < num_blocks, other=0)
        return first, tl.load(table_ptr + turn * 2 + 1, mask=turn * 2 + 1 < num_blocks, other=0)
    else:
        block = tl.load(table_ptr + turn, mask=turn < num_blocks, other=0)
        return block, block


@triton.jit
def _attend_turns(
    acc,
    total,
    highest,
    q,
    tile_ptr,
    table_ptr,
    begin,
    stop,
    positions,
    first_position,
    last_position,
    window,
    inner,
    unit,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Online softmax over turns begin .. stop - 1, turn i being keys i * BLOCK_KEYS and on.

    A turn in which a row sees nothing leaves the row's sums bit for bit, and one in which it sees all is the same with
    and without the mask: so a row's result does not depend on the rows that share its tile.
    """
    PAIRS: tl.constexpr = BLOCK_KEYS > BLOCK_SIZE
    dims, slots = tl.arange(0, PADDED_DIM)[None, :], tl.arange(0, BLOCK_KEYS)
    in_dim = dims < HEAD_DIM
    places = (slots % BLOCK_SIZE)[:, None] * HEAD_DIM + dims
    num_blocks = last_position // BLOCK_SIZE + 1
    # Blocks are looked up one turn ahead, or the loads that need them would be pipelined two stages less.
    block, second = _load_blocks(table_ptr, begin, num_blocks, PAIRS)  # pyright: ignore[reportGeneralTypeIssues]
    # A tile has one or two masked turns: little to fill a pipeline with.
    for turn in tl.range(begin, stop, num_stages=min(STAGES, 2) if MASKED else STAGES):
        next_block, next_second = _load_blocks(table_ptr, turn + 1, num_blocks, PAIRS)  # pyright: ignore[reportGeneralTypeIssues]
        blocks = block
        if PAIRS:
            blocks = tl.where(slots < BLOCK_SIZE, block, second)[:, None]
        k_ptrs = tile_ptr + blocks.to(tl.int64) * (2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM) + places
        v_ptrs = k_ptrs + NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM
        k = tl.load(k_ptrs, mask=in_dim, other=0.0)
        scores = cap_scores(tl.dot(q, tl.trans(k), input_precision="ieee"), inner, CAPPED)
        if MASKED:
            keys = turn * BLOCK_KEYS + slots
            # A slot that no row sees may hold another sequence's NaN, and 0 * NaN is NaN.
            read = keys <= last_position
            seen = keys[None, :] <= positions[:, None]
            if WINDOWED:
                read &= keys > first_position - window
                seen &= keys[None, :] > positions[:, None] - window
            v = tl.load(v_ptrs, mask=read[:, None] & in_dim, other=0.0)
            scores = tl.where(seen, scores, float("-inf"))
        else:
            v = tl.load(v_ptrs, mask=in_dim, other=0.0)
        higher = tl.maximum(highest, tl.max(scores, 1) * unit)
        shrink = tl.exp2(highest - higher)
        p = tl.exp2(scores * unit - higher[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher
        block, second = next_block, next_second
    return acc, total, highest


@triton.jit(do_not_specialize=["num_slices", "num_tiles", "window"])
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
    num_tiles,
    window,
    inner,
    unit,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per (kv head, tile)."""
    TOKENS: tl.constexpr = BLOCK_ROWS // GROUP
    kv_head, tile = tl.program_id(0).to(tl.int64), num_tiles - 1 - tl.program_id(1)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    prefill_start = tl.load(starts_ptr)
    index = _find_slice(starts_ptr, prefill_start, num_slices, tile, TOKENS)
    query_start = tl.load(starts_ptr + index)
    context_len = tl.load(context_lens_ptr + index)
    query_len = tl.minimum(tl.load(starts_ptr + index + 1) - query_start, context_len)
    first_token = (tile - (query_start - prefill_start) // TOKENS - index) * TOKENS
    if first_token >= query_len:
        return
    first_position = context_len - query_len + first_token
    last_position = tl.minimum(first_position + TOKENS, context_len) - 1

    rows, dims = tl.arange(0, BLOCK_ROWS), tl.arange(0, PADDED_DIM)
    tokens = first_token + rows // GROUP
    positions = context_len - query_len + tokens
    in_tile = ((rows < TOKENS * GROUP) & (tokens < query_len))[:, None] & (dims < HEAD_DIM)[None, :]
    q_tokens, heads = (query_start + tokens).to(tl.int64), kv_head * GROUP + rows % GROUP
    q_ptrs = q_ptr + q_tokens[:, None] * stride_q_token + heads[:, None] * stride_q_head + dims[None, :]
    q = tl.load(q_ptrs, mask=in_tile, other=0.0)
    tile_ptr = cache_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM)
    table_ptr = block_tables_ptr + index.to(tl.int64) * stride_table

    # The maximum begins at a finite number: -inf minus -inf would be NaN.
    highest = tl.full([BLOCK_ROWS], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, PADDED_DIM], tl.float32)
    left = 0
    if WINDOWED:
        edge = tl.maximum(first_position - window + 1, 0) // BLOCK_KEYS
        left = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_KEYS)
        left = tl.minimum(left, last_position // BLOCK_KEYS + 1)
        acc, total, highest = _attend_turns(
            acc, total, highest, q, tile_ptr, table_ptr, edge, left, positions, first_position, last_position,
            window, inner, unit, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_KEYS, HEAD_DIM, PADDED_DIM, WINDOWED, CAPPED, STAGES,
            True,
        )  # fmt: skip
    right = tl.maximum(left, (first_position + 1) // BLOCK_KEYS)
    acc, total, highest = _attend_turns(
        acc, total, highest, q, tile_ptr, table_ptr, left, right, positions, first_position, last_position,
        window, inner, unit, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_KEYS, HEAD_DIM, PADDED_DIM, WINDOWED, CAPPED, STAGES,
        False,
    )  # fmt: skip
    acc, total, highest = _attend_turns(
        acc, total, highest, q, tile_ptr, table_ptr, right, last_position // BLOCK_KEYS + 1, positions,
        first_position, last_position, window, inner, unit,
        NUM_KV_HEADS, BLOCK_SIZE, BLOCK_KEYS, HEAD_DIM, PADDED_DIM, WINDOWED, CAPPED, STAGES, True,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # rows beyond the slice may have seen nothing
    out_ptrs = out_ptr + (q_tokens[:, None] * (NUM_KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)


def prefill_launch(group: int, block_size: int, head_dim: int, element_size: int, *, plain: bool) -> dict[str, int]:
    """Rows of a tile, keys of a turn, pipeline stages, warps. `plain`: neither a window nor a soft cap.

    128 rows on 8 warps keep wgmma busy; 128 keys halve what a turn costs beside its products, where registers allow
    it. Products in fp32 run on the scalar units, unrolled: larger tiles than 16 rows spill and take minutes to compile.
    """
    wide = plain and head_dim <= 128 and element_size <= 2
    num_keys = 2 * block_size if wide and block_size <= 64 else block_size
    num_rows = max(16 if element_size == 4 else 128, int(triton.next_power_of_2(group)))
    row_bytes = padded_dim(head_dim) * element_size
    num_stages = 3 if head_dim <= 128 and element_size <= 2 else 2
    while num_stages > 1 and (num_rows + 2 * num_keys * (num_stages - 1)) * row_bytes > SHARED_BYTES:
        num_stages -= 1
    return {"BLOCK_ROWS": num_rows, "BLOCK_KEYS": num_keys, "STAGES": num_stages, "num_warps": 8}


def paged_prefill_triton(
    q: torch.Tensor,
    cache: torch.Tensor,
    tables: PrefillTables,
    *,
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
) -> None:
    """As `paged_prefill`, by the kernel of this file; shapes are checked there."""
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
        **prefill_launch(
            group, block_size, head_dim, q.element_size(), plain=tables.window is None and softcap is None
        ),
        **pdl_launch(q),
    }
    num_tiles = num_tokens // (launch["BLOCK_ROWS"] // group) + num_slices
    inner, unit = score_factors(scale, softcap)
    _paged_prefill_kernel[(num_kv_heads, num_tiles)](
        out, q, cache, tables.starts, tables.context_lens, tables.block_tables,
        q.stride(0), q.stride(1), tables.block_tables.stride(0), num_slices, num_tiles, tables.window or 0, inner, unit,
        **launch,
    )  # fmt: skip
