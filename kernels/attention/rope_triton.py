"""Triton kernel of rope.py, in fp32. Legend as there; R = 2 * HALF."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs

TILE, NUM_WARPS = 512, 2  # elements of each half: 8 a thread
# Above this count a program takes twice as much: an H200 SM starts one per 160 ns, moving 5 KB. 8192 tokens
# of 48 heads of 128, stored while rotated: 54 us so, 61 us not.
FEW_TOKENS = 512


@triton.jit
def load_halves(x_rows, live, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Both halves, fp32 [heads, BLOCK_HALF], of the first 2 * HALF features of live heads at x_rows."""
    i = tl.arange(0, BLOCK_HALF)
    mask = live[:, None] & (i < HALF)[None, :]
    x_ptrs = x_rows[:, None] + i[None, :]
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(x_rows, live, first, second, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """Inverse of `load_halves`: stores to heads at x_rows, in their dtype."""
    i = tl.arange(0, BLOCK_HALF)
    mask = live[:, None] & (i < HALF)[None, :]
    x_ptrs = x_rows[:, None] + i[None, :]
    tl.store(x_ptrs, first.to(x_rows.dtype.element_ty), mask=mask)
    tl.store(x_ptrs + HALF, second.to(x_rows.dtype.element_ty), mask=mask)


@triton.jit
def load_cos_sin(cos_sin_row, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """[1, BLOCK_HALF] each, from a row of HALF cosines, then HALF sines."""
    i = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_sin_row + i, mask=i < HALF, other=1.0)
    sin = tl.load(cos_sin_row + HALF + i, mask=i < HALF, other=0.0)
    return cos[None, :], sin[None, :]


@triton.jit
def _rope_kernel(
    x_ptr,
    cos_sin_ptr,
    position_ptr,
    stride_token,
    stride_head,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, h) rotates heads h * BLOCK_HEADS .. of token t."""
    release_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    live = heads < NUM_HEADS
    x_rows = x_ptr + token * stride_token + heads * stride_head
    wait_for_inputs(PDL)
    position = tl.load(position_ptr + token)
    first, second = load_halves(x_rows, live, HALF, BLOCK_HALF)  # pyright: ignore[reportGeneralTypeIssues]
    cos, sin = load_cos_sin(cos_sin_ptr + position * (2 * HALF), HALF, BLOCK_HALF)  # pyright: ignore[reportGeneralTypeIssues]
    store_halves(x_rows, live, first * cos - second * sin, second * cos + first * sin, HALF, BLOCK_HALF)


def launch_parameters(num_tokens: int, num_heads: int, width: int) -> tuple[int, int, int]:
    """(heads, features, num_warps) of a program's tile, for rows of `width` features.

    Summation order depends on `width` and `num_heads` alone.
    """
    block_width = int(triton.next_power_of_2(width))
    most_heads = int(triton.next_power_of_2(num_heads))
    if num_tokens > FEW_TOKENS and block_width <= TILE and most_heads * block_width >= 2 * TILE:
        return 2 * TILE // block_width, block_width, 2 * NUM_WARPS
    return min(max(1, TILE // block_width), most_heads), block_width, NUM_WARPS


def rope_triton(x: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> None:
    """Rotate x [T, N, D] in place. Raises ValueError where a head's features are not contiguous."""
    num_tokens, num_heads, _ = x.shape
    if x.stride(2) != 1:
        raise ValueError(f"x has strides {x.stride()}; a head's features must lie side by side")
    if x.numel() == 0:
        return
    half = cache.shape[1] // 2
    block_heads, block_half, num_warps = launch_parameters(num_tokens, num_heads, half)
    launch_kernel(
        _rope_kernel,
        (num_tokens, triton.cdiv(num_heads, block_heads)),
        (x, cache, positions, x.stride(0), x.stride(1)),
        NUM_HEADS=num_heads,
        HALF=half,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=num_warps,
        **pdl_launch(x),
    )
