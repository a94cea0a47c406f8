"""The GEMM of a linear layer, plain or with a gated MLP's gate in its epilogue.

    linear:        y[t, n] = sum_m x[t, m] * weight[n, m] + bias[n]
    gated_linear:  y[t, n] = act(gate[t, n]) * up[t, n]        gate, up: the first and the last N of linear's 2N outputs

Legend: T tokens, M features in, N features out. x [T, M], weight [N, M] (gated: [2N, M]), bias like its rows,
y [T, N]; one dtype, sums in fp32.
On CUDA a GEMM of few tokens is bound by reading the weight. tuning.py selects gemm_triton.py where it beats
cuBLAS; `launch_for` asks `backend_of`. Called by quant/methods/unquantized.py.

With `invariant` a row's bits do not depend on other rows: one tile shape and summation order for every T.
cuBLAS selects its kernel by T, so it is not used there.

Paper: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202; invariant form: He, Defeating
Nondeterminism in LLM Inference, 2025.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..tuning import launch_for
from .silu_mul import ACTIVATIONS, silu_mul, silu_mul_ref


def linear_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The formula in fp32; result in x's dtype."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def gated_linear_ref(
    x: torch.Tensor, weight: torch.Tensor, activation: str = "silu", bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in fp32; result in x's dtype."""
    both = linear_ref(x.float(), weight.float(), None if bias is None else bias.float())
    return silu_mul_ref(both, activation).to(x.dtype)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, invariant: bool = False
) -> torch.Tensor:
    """x [T, M], weight [N, M] -> [T, N] in x's dtype."""
    _check(x, weight, bias)
    launch = launch_for(x, weight, gated=False, invariant=invariant)
    if launch is None:
        return F.linear(x, weight, bias)
    from .gemm_triton import gemm_triton

    return gemm_triton(x, weight, bias, None, launch)


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    activation: str = "silu",
    bias: torch.Tensor | None = None,
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """x [T, M], weight [2N, M], gate rows first -> [T, N]; `activation` is in silu_mul's ACTIVATIONS."""
    _check(x, weight, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    if weight.shape[0] % 2:
        raise ValueError(f"the weight has {weight.shape[0]} rows; gate and up need an even number")
    launch = launch_for(x, weight, gated=True, invariant=invariant)
    if launch is None:
        return silu_mul(linear(x, weight, bias, invariant=invariant), activation)
    from .gemm_triton import gemm_triton

    return gemm_triton(x, weight, bias, activation, launch)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} and weight {list(weight.shape)} must be [T, M] and [N, M]")
    if x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}; both must be of one dtype")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias has shape {list(bias.shape)}; a weight {list(weight.shape)} takes [{len(weight)}]")


def linear_cost(num_tokens: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): x and weight read once, y written once."""
    numel = num_outputs * num_inputs + num_tokens * (num_inputs + num_outputs)
    return numel * dtype.itemsize, 2 * num_tokens * num_outputs * num_inputs


def gated_linear_cost(num_tokens: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops) of `num_outputs` gated outputs; the weight has twice as many rows."""
    numel = 2 * num_outputs * num_inputs + num_tokens * (num_inputs + num_outputs)
    return numel * dtype.itemsize, num_tokens * num_outputs * (4 * num_inputs + 5)
