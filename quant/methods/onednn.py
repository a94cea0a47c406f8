"""Torch's private oneDNN operators, which torch.compile's CPU backend uses; other torch versions may change them."""

from __future__ import annotations

import torch


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN takes this weight: on CPU, in fp32, or in bf16 with the processor's support."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """weight [N, M] in oneDNN's blocked layout, for `linear_packed`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def linear_packed(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., M] -> x @ weight.T + bias, [..., N]."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
