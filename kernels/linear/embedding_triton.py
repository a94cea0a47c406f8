"""Triton kernel of embedding.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs

BLOCK_H, NUM_WARPS = 1024, 4  # 8 elements a thread: one 16-byte load in half precision


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _embed_kernel(
    ids_ptr,
    weight_ptr,
    out_ptr,
    stride_row,
    first_row,
    num_rows,
    num_features,
    scale,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (t, b) looks up features b * BLOCK_H .. of token t."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(ids_ptr + t).to(tl.int64) - first_row
    mask = columns < num_features
    held = (row >= 0) & (row < num_rows)
    x = tl.load(weight_ptr + row * stride_row + columns, mask=mask & held, other=0.0)
    x = x.to(tl.float32) * scale
    tl.store(out_ptr + t * num_features + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


def embed_triton(input_ids: torch.Tensor, weight: torch.Tensor, first_row: int, scale: float) -> torch.Tensor:
    """`embedding.embed` for checked arguments."""
    num_tokens, (num_rows, num_features) = len(input_ids), weight.shape
    out = torch.empty((num_tokens, num_features), dtype=weight.dtype, device=weight.device)
    if weight.stride(1) != 1:
        raise ValueError(f"weight has strides {weight.stride()}; the features of a row must lie side by side")
    if num_tokens:
        launch_kernel(
            _embed_kernel,
            (num_tokens, triton.cdiv(num_features, BLOCK_H)),
            (input_ids.contiguous(), weight, out, weight.stride(0), first_row, num_rows, num_features, float(scale)),
            BLOCK_H=BLOCK_H,
            num_warps=NUM_WARPS,
            **pdl_launch(weight),
        )
    return out
