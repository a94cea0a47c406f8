"""Root-mean-square normalisation, alone or after the residual addition.

    rms_norm(x, w)[t]          = x[t] / sqrt(mean(x[t]^2) + eps) * w
    add_rms_norm(x, r, w)      : r <- r + x, then rms_norm(r, w)

Legend: T rows (any leading axes), N features. x and r [..., N]; w [N]; sums in fp32. A Gemma norm, `x * (1 +
w)`, loads 1 + w in fp32: bf16 would lose w's low bits.

On CUDA: rms_norm_triton.py. Called by replicas/layers/norm.py for every norm, q/k norms included.
Paper: Zhang & Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

import torch

from ..backend import Backend, backend_of


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The formula in fp32; result in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise x [..., N] over its last axis and scale by weight [N]. Returns a new tensor of x's dtype."""
    _check_weight(x, weight)
    if backend_of(x) is not Backend.TORCH:
        from .rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps)
    return _rms_norm_torch(x, weight, eps)


def _check_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {x.shape[-1]} features")


def _rms_norm_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # Half the time of torch.nn.functional.rms_norm (composite on CPU) at one row of 256: 4 us
    # against 8.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    floor = torch.scalar_tensor(eps, dtype=torch.float32, device=x.device)
    scale = torch.addcmul(floor, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    if x.dtype == torch.float32:
        return (x * weight).mul_(scale)
    return (x.float() * scale).mul_(weight).to(x.dtype)


def add_rms_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised, new residual); inputs unchanged."""
    total = residual + x
    return rms_norm_ref(total, weight, eps), total


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add x [..., N] to `residual` in place and return the normalised sum."""
    if x.shape != residual.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, the residual {tuple(residual.shape)}")
    _check_weight(x, weight)
    if backend_of(x) is not Backend.TORCH:
        from .rms_norm_triton import rms_norm_triton

        return rms_norm_triton(x, weight, eps, residual)
    return _rms_norm_torch(residual.add_(x), weight, eps)


def rms_norm_cost(num_rows: int, num_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): x read, result written; the small weight stays in cache."""
    size = num_rows * num_features
    return 2 * size * dtype.itemsize, 4 * size


def add_rms_norm_cost(num_rows: int, num_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): x and residual read, residual and result written."""
    size = num_rows * num_features
    return 4 * size * dtype.itemsize, 5 * size
