"""Triton kernel of block_copy.py: sources and targets may overlap.

A program copies BLOCK_N columns of all copies: it loads every source, waits for its warps, then writes. So
one tile needs no buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs

MAX_COPIES = 16
BLOCK_N, NUM_WARPS = 256, 4  # 32 elements a thread at MAX_COPIES


@triton.jit(do_not_specialize=["num_copies"])
def _block_copy_kernel(
    cache_ptr,
    source_ptr,
    target_ptr,
    num_copies,
    block_numel,
    MAX_COPIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p copies columns p * BLOCK_N .. of every block pair."""
    release_dependents(PDL)
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    copies = tl.arange(0, MAX_COPIES)
    used = copies < num_copies
    mask = used[:, None] & (columns < block_numel)[None, :]
    wait_for_inputs(PDL)
    sources = tl.load(source_ptr + copies, mask=used, other=0)
    targets = tl.load(target_ptr + copies, mask=used, other=0)
    values = tl.load(cache_ptr + sources[:, None] * block_numel + columns[None, :], mask=mask, other=0.0)
    tl.debug_barrier()
    tl.store(cache_ptr + targets[:, None] * block_numel + columns[None, :], values, mask=mask)


def block_copy_triton(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """cache[target] = cache[source] for at most MAX_COPIES blocks of a contiguous cache."""
    assert source.numel() <= MAX_COPIES
    if not cache.is_contiguous():
        raise ValueError(f"the cache has strides {cache.stride()}; it must be without gaps")
    block_numel = cache[0].numel()
    if block_numel == 0 or source.numel() == 0:
        return
    launch_kernel(
        _block_copy_kernel,
        (triton.cdiv(block_numel, BLOCK_N),),
        (cache, source, target, source.numel(), block_numel),
        MAX_COPIES=MAX_COPIES,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
        **pdl_launch(cache),
    )
