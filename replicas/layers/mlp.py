"""The gated MLP: down(act(gate(x)) * up(x)), gate and up in one GEMM."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...quant.methods.linear_method import LayerKind, MethodFor
from ..model_spec import DecoderSpec
from ..parallel.comm import ParallelContext
from .linear import ColumnParallelLinear, RowParallelLinear
from .weights import Layer, WeightSlot


class GatedMLP(Layer):
    """x [T, hidden] -> [T, hidden], this rank's partial sum."""

    def __init__(
        self,
        spec: DecoderSpec,
        number: int,
        comm: ParallelContext,
        method_for: MethodFor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        size, name = spec.intermediate_size, f"layers.{number}.mlp"
        self.activation = spec.hidden_act
        self.gate_up_proj = ColumnParallelLinear(
            spec.hidden_size, {"gate_proj": size, "up_proj": size}, comm,
            bias=spec.mlp_bias, method=method_for(f"{name}.gate_up_proj", LayerKind.GATE_UP),
            dtype=dtype, device=device, fused_name="gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            size, spec.hidden_size, "down_proj", comm,
            bias=spec.mlp_bias, method=method_for(f"{name}.down_proj", LayerKind.DOWN), dtype=dtype, device=device,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj.gated(x, self.activation))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.gate_up_proj.weight_slots(prefix)
        yield from self.down_proj.weight_slots(prefix)
