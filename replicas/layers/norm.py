"""RMSNorm as a layer: holds the weight, calls the kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.linear.rms_norm import add_rms_norm, rms_norm
from .weights import Layer, Source, WeightSlot, empty_parameter


class RMSNorm(Layer):
    """Normalises the last axis of x [..., size]; with a residual, adds x to it in place first.

    `offset` 1 is Gemma's 1 + w: folded into the weight as it is loaded, and kept in fp32.
    """

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device, offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = empty_parameter((size,), torch.float32 if offset else dtype, device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(self.weight, (Source(f"{prefix}.weight", tuple(self.weight.shape)),), self.offset)
