"""Triton kernels of kv_store.py: store one token's heads, with or without RoPE.

Legend as in kv_store.py and rope.py; H query heads, R = 2 * HALF. cache contiguous; norm weights [D].

More tokens use more warps, not more features per thread: a norm's summation order is independent of T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .rope_triton import launch_parameters, load_cos_sin, load_halves, store_halves


@triton.jit
def _slot_rows(cache_ptr, slot, kv_heads, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to heads 0 .. 2 KV - 1 (keys, then values) of a slot."""
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
    PDL: tl.constexpr,
):
    """Program (t, h) stores heads h * BLOCK_HEADS .. of token t in its slot."""
    release_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    mask = (heads < 2 * NUM_KV_HEADS)[:, None] & (d < HEAD_DIM)[None, :]
    kv_rows = kv_ptr + token * stride_token + heads * stride_head
    wait_for_inputs(PDL)
    slot = tl.load(slot_ptr + token)
    kv = tl.load(kv_rows[:, None] + d[None, :], mask=mask, other=0.0)
    slot_rows = _slot_rows(cache_ptr, slot, heads, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    tl.store(slot_rows[:, None] + d[None, :], kv.to(cache_ptr.dtype.element_ty), mask=mask & (slot >= 0))


@triton.jit
def _norm_weight(q_norm_ptr, k_norm_ptr, d, inside, heads, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr):
    """fp32 [heads, features]: the norm weight, 1 for values."""
    q_weight = tl.load(q_norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
    k_weight = tl.load(k_norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
    of_key = tl.where((heads < NUM_HEADS + NUM_KV_HEADS)[:, None], k_weight[None, :], 1.0)
    return tl.where((heads < NUM_HEADS)[:, None], q_weight[None, :], of_key)


@triton.jit
def _rope_kv_store_kernel(
    qkv_ptr,
    cos_sin_ptr,
    position_ptr,
    cache_ptr,
    slot_ptr,
    q_norm_ptr,
    k_norm_ptr,
    eps,
    stride_token,
    stride_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, h) norms, rotates and stores heads h * BLOCK_HEADS .. of token t."""
    release_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    live = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    turned = heads < NUM_HEADS + NUM_KV_HEADS
    is_query = heads < NUM_HEADS
    qkv_rows = qkv_ptr + token * stride_token + heads * stride_head
    i = tl.arange(0, BLOCK_HALF)
    d = 2 * HALF + tl.arange(0, BLOCK_REST if BLOCK_REST > 0 else 1)
    in_rest = live[:, None] & (d < HEAD_DIM)[None, :]
    if NORM:
        w_first = _norm_weight(q_norm_ptr, k_norm_ptr, i, i < HALF, heads, NUM_HEADS, NUM_KV_HEADS)
        w_second = _norm_weight(q_norm_ptr, k_norm_ptr, HALF + i, i < HALF, heads, NUM_HEADS, NUM_KV_HEADS)
        w_rest = _norm_weight(q_norm_ptr, k_norm_ptr, d, d < HEAD_DIM, heads, NUM_HEADS, NUM_KV_HEADS)
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + token)
    slot = tl.load(slot_ptr + token)
    first, second = load_halves(qkv_rows, live, HALF, BLOCK_HALF)
    rest = tl.load(qkv_rows[:, None] + d[None, :], mask=in_rest, other=0.0).to(tl.float32)
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * HALF), HALF, BLOCK_HALF)
    if NORM:
        squares = tl.sum(first * first + second * second, axis=1) + tl.sum(rest * rest, axis=1)
        scale = tl.where(turned, tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps), 1.0)[:, None]
        first, second, rest = first * scale * w_first, second * scale * w_second, rest * scale * w_rest
    new_first = tl.where(turned[:, None], first * cos - second * sin, first)
    new_second = tl.where(turned[:, None], second * cos + first * sin, second)
    stored = live & (heads >= NUM_HEADS) & (slot >= 0)
    slot_rows = _slot_rows(cache_ptr, slot, heads - NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    store_halves(qkv_rows, is_query, new_first, new_second, HALF, BLOCK_HALF)
    store_halves(slot_rows, stored, new_first, new_second, HALF, BLOCK_HALF)
    if BLOCK_REST > 0:
        tl.store(slot_rows[:, None] + d[None, :], rest.to(cache_ptr.dtype.element_ty), mask=stored[:, None] & in_rest)
        if NORM:
            tl.store(
                qkv_rows[:, None] + d[None, :], rest.to(qkv_ptr.dtype.element_ty), mask=is_query[:, None] & in_rest
            )


def rope_launch_parameters(num_tokens: int, num_rows: int, half: int, rest: int) -> tuple[int, int, int, int]:
    """(BLOCK_HEADS, BLOCK_HALF, BLOCK_REST, num_warps) for heads of two rotated halves and a rest."""
    block_heads, _, num_warps = launch_parameters(num_tokens, num_rows, max(half, rest))
    block_rest = int(triton.next_power_of_2(rest)) if rest else 0
    return block_heads, int(triton.next_power_of_2(half)), block_rest, num_warps


def _check(x: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    if x.stride(2) != 1 or not cache.is_contiguous():
        raise ValueError(
            f"strides {x.stride()} and, of the cache, {cache.stride()}: a head's features must lie side by side, and "
            "the cache without gaps"
        )
    if slot_mapping.shape != (x.shape[0],):
        raise ValueError(f"{tuple(slot_mapping.shape)} slots for {x.shape[0]} tokens")


def kv_store_triton(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Write kv [T, 2 KV, D] to the cache."""
    _check(kv, cache, slot_mapping)
    if kv.numel() == 0:
        return
    num_tokens, num_rows, head_dim = kv.shape
    block_heads, block_dim, num_warps = launch_parameters(num_tokens, num_rows, head_dim)
    launch_kernel(
        _kv_store_kernel,
        (num_tokens, triton.cdiv(num_rows, block_heads)),
        (kv, cache, slot_mapping, kv.stride(0), kv.stride(1)),
        NUM_KV_HEADS=num_rows // 2,
        BLOCK_SIZE=cache.shape[3],
        HEAD_DIM=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_DIM=block_dim,
        num_warps=num_warps,
        **pdl_launch(kv),
    )


def rope_kv_store_triton(
    qkv: torch.Tensor,
    num_heads: int,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
) -> None:
    """Rotate queries of qkv [T, H + 2 KV, D] in place; write rotated keys, and values, to the cache only."""
    _check(qkv, cache, slot_mapping)
    if qkv.numel() == 0:
        return
    num_tokens, num_rows, head_dim = qkv.shape
    half = cos_sin.shape[1] // 2
    block_heads, block_half, block_rest, num_warps = rope_launch_parameters(
        num_tokens, num_rows, half, head_dim - 2 * half
    )
    q_norm, k_norm = norms or (qkv, qkv)
    launch_kernel(
        _rope_kv_store_kernel,
        (num_tokens, triton.cdiv(num_rows, block_heads)),
        (qkv, cos_sin, positions, cache, slot_mapping, q_norm, k_norm, eps, qkv.stride(0), qkv.stride(1)),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=(num_rows - num_heads) // 2,
        BLOCK_SIZE=cache.shape[3],
        HEAD_DIM=head_dim,
        HALF=half,
        NORM=norms is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        BLOCK_REST=block_rest,
        num_warps=num_warps,
        **pdl_launch(qkv),
    )
