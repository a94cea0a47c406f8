"""Triton kernels of kv_store.py: heads of one token to its slot of the paged cache, rotated on the way or as they are.

Legend: T tokens, H query heads, KV kv heads, B blocks, BS block_size, D head_dim, R = 2 * HALF rotated features.
cache [B, 2, KV, BS, D] without gaps; slot_mapping int64 [T]; cos/sin cache [P, R] fp32; positions int64 [T].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rope_triton import NUM_WARPS, launch_parameters, load_rotated, store_halves


@triton.jit
def _slot_rows(cache_ptr, slot, kv_heads, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to where heads 0 .. 2 KV - 1 (keys, then values) of a slot begin."""
    first_row = slot // BLOCK_SIZE * (2 * NUM_KV_HEADS * BLOCK_SIZE) + slot % BLOCK_SIZE
    return cache_ptr + (first_row + kv_heads * BLOCK_SIZE) * HEAD_DIM


@triton.jit
def _kv_store_kernel(
    kv_ptr,
    cache_ptr,
    slot_ptr,
    stride_token,
    stride_head,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    mask = (heads < 2 * NUM_KV_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    kv_rows = kv_ptr + token * stride_token + heads * stride_head
    slot_rows = _slot_rows(cache_ptr, tl.load(slot_ptr + token), heads, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    kv = tl.load(kv_rows[:, None] + d[None, :], mask=mask, other=0.0)
    tl.store(slot_rows[:, None] + d[None, :], kv.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rope_kv_store_kernel(
    qkv_ptr,
    cos_sin_ptr,
    position_ptr,
    cache_ptr,
    slot_ptr,
    stride_token,
    stride_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    live = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    is_query = heads < NUM_HEADS
    is_stored = live & (heads >= NUM_HEADS)
    qkv_rows = qkv_ptr + token * stride_token + heads * stride_head
    kv_heads = heads - NUM_HEADS
    slot_rows = _slot_rows(cache_ptr, tl.load(slot_ptr + token), kv_heads, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    cos_sin_row = cos_sin_ptr + tl.load(position_ptr + token) * (2 * HALF)
    first, second = load_rotated(qkv_rows, heads < NUM_HEADS + NUM_KV_HEADS, live, cos_sin_row, HALF, BLOCK_HALF)
    store_halves(qkv_rows, is_query, first, second, HALF, BLOCK_HALF)
    store_halves(slot_rows, is_stored, first, second, HALF, BLOCK_HALF)
    if BLOCK_REST > 0:
        d = 2 * HALF + tl.arange(0, BLOCK_REST)
        mask = is_stored[:, None] & (d < HEAD_DIM)[None, :]
        rest = tl.load(qkv_rows[:, None] + d[None, :], mask=mask, other=0.0)
        tl.store(slot_rows[:, None] + d[None, :], rest.to(cache_ptr.dtype.element_ty), mask=mask)


def _check(x: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    if x.stride(2) != 1 or not cache.is_contiguous():
        raise ValueError(
            f"strides {x.stride()} and, of the cache, {cache.stride()}: a head's features must lie side by side, and "
            "the cache without gaps"
        )
    if slot_mapping.shape != (x.shape[0],):
        raise ValueError(f"{tuple(slot_mapping.shape)} slots for {x.shape[0]} tokens")


def kv_store_triton(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Writes kv [T, 2 KV, D] to the slots of the cache."""
    _check(kv, cache, slot_mapping)
    if kv.numel() == 0:
        return
    num_tokens, num_rows, head_dim = kv.shape
    block_heads, block_dim = launch_parameters(num_rows, head_dim)
    _kv_store_kernel[(num_tokens, triton.cdiv(num_rows, block_heads))](
        kv, cache, slot_mapping, kv.stride(0), kv.stride(1),
        NUM_KV_HEADS=num_rows // 2, BLOCK_SIZE=cache.shape[3], HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim, num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


def rope_kv_store_triton(
    qkv: torch.Tensor,
    num_heads: int,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Rotates the queries of qkv [T, H + 2 KV, D] in place; writes rotated keys, and values, to the cache alone."""
    _check(qkv, cache, slot_mapping)
    if qkv.numel() == 0:
        return
    num_tokens, num_rows, head_dim = qkv.shape
    half = cos_sin.shape[1] // 2
    rest = head_dim - 2 * half
    block_heads, block_half = launch_parameters(num_rows, half)
    _rope_kv_store_kernel[(num_tokens, triton.cdiv(num_rows, block_heads))](
        qkv, cos_sin, positions, cache, slot_mapping, qkv.stride(0), qkv.stride(1),
        NUM_HEADS=num_heads, NUM_KV_HEADS=(num_rows - num_heads) // 2, BLOCK_SIZE=cache.shape[3], HEAD_DIM=head_dim,
        HALF=half, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        BLOCK_REST=int(triton.next_power_of_2(rest)) if rest else 0, num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
