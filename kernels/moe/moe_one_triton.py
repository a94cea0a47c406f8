"""Triton kernels of moe.py for one token: its experts' weights are read once, without sorting.

Legend as in moe.py. Both multiply on CUDA cores, 16-byte loads at a time, in many small programs, with the
next weights prefetched. A program of the second kernel loops over all k experts of its features : no buffer
or further kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..ops_triton import activate
from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs


@triton.jit
def _products(w, x):
    """w [features, inner] * x [inner] -> [features, inner / 8]: sums of eight, to save registers."""
    products = w.to(tl.float32) * x[None, :]
    return tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // 8, 8)), 2)


@triton.jit
def _gate_up_few_experts_kernel(
    x_ptr,
    gate_up_ptr,
    scale_ptr,
    experts_ptr,
    hidden_ptr,
    num_features,
    num_inner,
    GELU: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden[i] = weights[i] * act(gate_up[e_i, :I] @ x) * (gate_up[e_i, I:] @ x), fp32."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    i = tl.program_id(1)
    expert = tl.load(experts_ptr + i).to(tl.int64)
    features = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inner = tl.arange(0, BLOCK_INNER)
    size = tl.cast(num_features, tl.int64) * num_inner
    rows = tl.minimum(features, num_features - 1).to(tl.int64) * num_inner
    gate_ptrs = gate_up_ptr + expert * (2 * size) + rows[:, None] + inner[None, :]
    up_ptrs = gate_ptrs + size
    w_gate = tl.load(gate_ptrs, mask=(inner < num_inner)[None, :], other=0.0)
    w_up = tl.load(up_ptrs, mask=(inner < num_inner)[None, :], other=0.0)
    gate = tl.zeros([BLOCK_FEATURES, BLOCK_INNER // 8], tl.float32)
    up = tl.zeros([BLOCK_FEATURES, BLOCK_INNER // 8], tl.float32)
    for start in range(0, num_inner, BLOCK_INNER):
        ahead = (inner < num_inner - start - BLOCK_INNER)[None, :]
        next_gate = tl.load(gate_ptrs + start + BLOCK_INNER, mask=ahead, other=0.0)
        next_up = tl.load(up_ptrs + start + BLOCK_INNER, mask=ahead, other=0.0)
        x = tl.load(x_ptr + start + inner, mask=inner < num_inner - start, other=0.0).to(tl.float32)
        gate += _products(w_gate, x)
        up += _products(w_up, x)
        w_gate, w_up = next_gate, next_up
    y_gate, y_up = tl.sum(gate, 1), tl.sum(up, 1)
    y = activate(y_gate, y_up, GELU) * tl.load(scale_ptr + i).to(tl.float32)
    tl.store(hidden_ptr + i * num_features + features, y, mask=features < num_features)


@triton.jit
def _down_few_experts_kernel(
    hidden_ptr,
    down_ptr,
    experts_ptr,
    out_ptr,
    num_features,
    num_inner,
    TOP_K: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = the sum over i of down[e_i] @ hidden[i], in order."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    features = tl.program_id(0) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inner = tl.arange(0, BLOCK_INNER)
    size = tl.cast(num_features, tl.int64) * num_inner
    w_ptrs = down_ptr + tl.minimum(features, num_features - 1).to(tl.int64)[:, None] * num_inner + inner[None, :]
    blocks = tl.cdiv(num_inner, BLOCK_INNER)
    expert = tl.load(experts_ptr).to(tl.int64)
    w = tl.load(w_ptrs + expert * size, mask=(inner < num_inner)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_FEATURES, BLOCK_INNER // 8], tl.float32)
    for step in range(TOP_K * blocks):
        i, start = (step + 1) // blocks, (step + 1) % blocks * BLOCK_INNER
        expert = tl.load(experts_ptr + tl.minimum(i, TOP_K - 1)).to(tl.int64)
        ahead = ((inner < num_inner - start) & (i < TOP_K))[None, :]
        next_w = tl.load(w_ptrs + expert * size + start, mask=ahead, other=0.0)
        present = step % blocks * BLOCK_INNER
        x_ptrs = hidden_ptr + step // blocks * num_inner + present + inner
        x = tl.load(x_ptrs, mask=inner < num_inner - present, other=0.0)
        acc += _products(w, x)
        w = next_w
    tl.store(out_ptr + features, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=features < num_features)


def one_token_launch(num_inner: int, *, gated: bool) -> dict[str, int]:
    """16 bytes of each row and 4 rows per thread in 16-bit dtypes; fewer warps for rows shorter than 1024."""
    block_inner = max(256, min(1024, int(triton.next_power_of_2(num_inner))))
    return {"BLOCK_FEATURES": 2 if gated else 4, "BLOCK_INNER": block_inner, "num_warps": block_inner // 256}


def moe_one_token_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """`moe_mlp` of checked x [1, H]."""
    _, num_hidden, num_inner = down.shape
    top_k = experts.shape[1]
    hidden = torch.empty(top_k, num_inner, dtype=torch.float32, device=x.device)
    out = torch.empty(1, num_hidden, dtype=x.dtype, device=x.device)
    first: dict[str, Any] = {"GELU": activation != "silu", **one_token_launch(num_hidden, gated=True), **pdl_launch(x)}
    launch_kernel(
        _gate_up_few_experts_kernel,
        (triton.cdiv(num_inner, first["BLOCK_FEATURES"]), top_k),
        (x.contiguous(), gate_up, weights.contiguous(), experts.contiguous(), hidden, num_inner, num_hidden),
        **first,
    )
    second: dict[str, Any] = {"TOP_K": top_k, **one_token_launch(num_inner, gated=False), **pdl_launch(x)}
    launch_kernel(
        _down_few_experts_kernel,
        (triton.cdiv(num_hidden, second["BLOCK_FEATURES"]),),
        (hidden, down, experts.contiguous(), out, num_hidden, num_inner),
        **second,
    )
    return out
