"""RMSNorm as a layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.linear.rms_norm import add_rms_norm, rms_norm
from .weights import Layer, Source, WeightSlot, empty_parameter


class RMSNorm(Layer):
    """Norms the last axis of x [..., size]; adds x to a residual in place first, if given.

    `offset` 1 is Gemma's 1 + w: added to the weight as it loads, and kept in fp32.
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
