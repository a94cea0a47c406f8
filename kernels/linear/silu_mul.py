"""The gate of a gated MLP: act(gate) * up, on the fused gate_up projection.

    y[t, i] = act(x[t, i]) * x[t, I + i]         act: SiLU, or GELU in its tanh form

Legend: T tokens, I intermediate features. x [..., 2I], y [..., I].
On CUDA: silu_mul_triton.py. Called by quant/methods/unquantized.py, linear/gemm.py and moe/moe.py.
Paper: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backend import Backend, backend_of

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


def silu_mul_ref(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The formula in fp32; result in x's dtype."""
    gate, up = x.float().chunk(2, dim=-1)
    act = gate * torch.sigmoid(gate)
    if activation == "gelu_pytorch_tanh":
        act = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return (act * up).to(x.dtype)


def silu_mul(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """x [..., 2I] -> [..., I]; `activation` is in ACTIVATIONS (Hugging Face names)."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} features; gate and up need an even number")
    if backend_of(x) is not Backend.TORCH:
        from .silu_mul_triton import silu_mul_triton

        return silu_mul_triton(x, activation)
    gate, up = x.chunk(2, dim=-1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act.mul_(up)


def silu_mul_cost(num_tokens: int, num_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops) for x [num_tokens, 2 * num_features]; an exponential is one flop."""
    size = num_tokens * num_features
    return 3 * size * dtype.itemsize, 5 * size
