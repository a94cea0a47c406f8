"""Triton kernels of moe.py that choose experts and sort the slots, without a host sync.

Legend: T tokens, E experts, k experts per token; slot t * k + i is token t's i-th expert, S = T * k slots.

The slots are sorted by expert, stably. Each expert's run is cut into tiles of at most `tile_rows` rows.
`order` int32 [S]: the sorted slots. `tiles` int32 [1 + 3 N]: the number of tiles, then three arrays [N]:
each tile's expert; its first sorted row; the end of its expert's rows. N is the most tiles that S slots can
make, so grids follow from shapes alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs

CHUNK = 4096  # pairs of token and expert in a sorting program; beyond one program, another kernel counts


@triton.jit(do_not_specialize=["num_tokens"])
def _route_experts_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    stride_logits,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p selects the top-k experts of tokens p * BLOCK_ROWS .., and their weights."""
    wait_for_inputs(PDL)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_E)
    live, real = rows < num_tokens, (columns < NUM_EXPERTS)[None, :]
    mask = live[:, None] & real
    logits = tl.load(logits_ptr + rows[:, None] * stride_logits + columns[None, :], mask=mask, other=0.0)
    release_dependents(PDL)
    logits = tl.where(real, logits.to(tl.float32), float("-inf"))
    p = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    # One key that orders by p (its bits, as p >= 0), then by lowest expert. NaN (padding) is the largest p.
    bits = (p.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    keys = tl.where(real, (bits << 16) | (0xFFFF - columns)[None, :], -1)
    places = tl.arange(0, BLOCK_K)
    chosen = tl.zeros([BLOCK_ROWS, BLOCK_K], tl.int64)
    for i in tl.static_range(TOP_K):
        best = tl.max(keys, 1)[:, None]
        keys = tl.where(keys == best, -1, keys)
        chosen = tl.where(places[None, :] == i, best, chosen)
    experts = 0xFFFF - (chosen & 0xFFFF)
    weights = (chosen >> 16).to(tl.int32).to(tl.float32, bitcast=True)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    out = rows[:, None] * TOP_K + places[None, :]
    mask = live[:, None] & (places < TOP_K)[None, :]
    tl.store(weights_ptr + out, weights.to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(experts_ptr + out, experts, mask=mask)


@triton.jit
def _chunk_choices(experts_ptr, chunk, num_tokens, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """(chose, slot), int32 [BLOCK_T, BLOCK_E]: 1 where a token chose an expert, and its slot."""
    tokens = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)[None, :]
    chose = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    slot = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for i in tl.static_range(TOP_K):
        expert = tl.load(experts_ptr + tokens * TOP_K + i, mask=tokens < num_tokens, other=-1).to(tl.int32)
        here = expert[:, None] == columns
        chose = tl.where(here, 1, chose)
        slot = tl.where(here, (tokens * TOP_K + i)[:, None], slot)
    return chose, slot


@triton.jit(do_not_specialize=["num_tokens"])
def _count_experts_kernel(
    experts_ptr,
    counts_ptr,
    num_tokens,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts [chunks, BLOCK_E]; one program per chunk."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    chunk = tl.program_id(0)
    chose, _ = _chunk_choices(experts_ptr, chunk, num_tokens, TOP_K, BLOCK_T, BLOCK_E)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(counts_ptr + chunk * BLOCK_E + tl.arange(0, BLOCK_E), tl.sum(chose, 0))


@triton.jit(do_not_specialize=["num_tokens", "max_tiles", "tile_rows"])
def _sort_experts_kernel(
    experts_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    num_tokens,
    max_tiles,
    tile_rows,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ALONE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Places the slots of one chunk of tokens and writes its share of `tiles`."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], tl.int32)
    chose, slot = _chunk_choices(experts_ptr, chunk, num_tokens, TOP_K, BLOCK_T, BLOCK_E)  # pyright: ignore[reportGeneralTypeIssues]
    if ALONE:
        counts = tl.sum(chose, 0)
    else:
        every = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        earlier = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        for first in range(0, num_chunks, BLOCK_T):
            chunks = first + tl.arange(0, BLOCK_T)
            part_ptrs = counts_ptr + chunks[:, None] * BLOCK_E + columns[None, :]
            part = tl.load(part_ptrs, mask=(chunks < num_chunks)[:, None], other=0)
            every += part
            earlier += tl.where((chunks < chunk)[:, None], part, 0)
        counts, before = tl.sum(every, 0), tl.sum(earlier, 0)
    ends = tl.cumsum(counts, 0)
    starts = ends - counts
    place = (starts + before)[None, :] + tl.cumsum(chose, 0) - 1
    tl.store(order_ptr + place, slot, mask=chose == 1)

    num_tiles = (counts + tile_rows - 1) // tile_rows
    tile_ends = tl.cumsum(num_tiles, 0)
    if chunk == 0:
        tl.store(tiles_ptr, tl.sum(num_tiles, 0))
    for i in range(chunk, tl.max(num_tiles, 0), num_chunks):  # every expert's tile i
        tile_ptrs = tiles_ptr + 1 + tile_ends - num_tiles + i
        tl.store(tile_ptrs, columns, mask=i < num_tiles)
        tl.store(tile_ptrs + max_tiles, starts + i * tile_rows, mask=i < num_tiles)
        tl.store(tile_ptrs + 2 * max_tiles, ends, mask=i < num_tiles)


def route_launch(num_experts: int, top_k: int) -> dict[str, int]:
    """256 logits per one-warp program, so that a row's maximum needs no barrier."""
    block_e = int(triton.next_power_of_2(num_experts))
    return {
        "BLOCK_ROWS": max(1, 256 // block_e),
        "BLOCK_E": block_e,
        "BLOCK_K": int(triton.next_power_of_2(top_k)),
        "num_warps": 1,
    }


def route_triton(logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, k], expert ids int64 [T, k]) of logits [T, E] with contiguous rows."""
    num_tokens, num_experts = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    weights = torch.empty(num_tokens, top_k, dtype=logits.dtype, device=logits.device)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits.device)
    if num_tokens == 0:
        return weights, experts
    launch: dict[str, Any] = {"NUM_EXPERTS": num_experts, "TOP_K": top_k, "RENORMALIZE": renormalize}
    launch |= route_launch(num_experts, top_k) | pdl_launch(logits)
    launch_kernel(
        _route_experts_kernel,
        (triton.cdiv(num_tokens, launch["BLOCK_ROWS"]),),
        (logits, weights, experts, logits.stride(0), num_tokens),
        **launch,
    )
    return weights, experts


def most_tiles(num_slots: int, num_experts: int, tile_rows: int) -> int:
    """Each chosen expert may leave one tile partly filled."""
    chosen = min(num_slots, num_experts)
    return min(num_slots, (num_slots + chosen * (tile_rows - 1)) // tile_rows)


def sort_launch(num_tokens: int, num_experts: int) -> dict[str, int]:
    """A chunk's tokens make CHUNK pairs of token and expert; at least 16."""
    block_e = max(16, int(triton.next_power_of_2(num_experts)))
    block_t = 16 if num_tokens <= 16 else max(16, CHUNK // block_e)
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": max(4, block_t * block_e // 512)}


def sort_by_expert(experts: torch.Tensor, num_experts: int, tile_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order, tiles) of chosen experts int64 [T, k] in 0 .. num_experts - 1, distinct per token."""
    num_tokens, top_k = experts.shape
    shape = sort_launch(num_tokens, num_experts)
    launch: dict[str, Any] = {"TOP_K": top_k, **shape, **pdl_launch(experts)}
    num_chunks = -(-num_tokens // shape["BLOCK_T"])
    max_tiles = most_tiles(experts.numel(), num_experts, tile_rows)
    order = torch.empty(experts.numel(), dtype=torch.int32, device=experts.device)
    tiles = torch.empty(1 + 3 * max_tiles, dtype=torch.int32, device=experts.device)
    counts = order
    if num_chunks > 1:
        counts = torch.empty(num_chunks, shape["BLOCK_E"], dtype=torch.int32, device=experts.device)
        launch_kernel(_count_experts_kernel, (num_chunks,), (experts, counts, num_tokens), **launch)
    launch["ALONE"] = num_chunks == 1
    launch_kernel(
        _sort_experts_kernel, (num_chunks,), (experts, counts, order, tiles, num_tokens, max_tiles, tile_rows), **launch
    )
    return order, tiles
