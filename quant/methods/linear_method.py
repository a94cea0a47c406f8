"""A weight's storage scheme: one LinearMethod per scheme, one WeightSpec per stored tensor.

Legend: M features in, N features out (of the layer or of a rank's part).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

import torch

from ...kernels.linear.silu_mul import silu_mul

STORED_FLOATS = ("F32", "F16", "BF16", "F64")
_CAST = (torch.float32, torch.float16, torch.bfloat16)
_EXACT = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class LayerKind(StrEnum):
    """The GEMMs of a decoder that a method can serve."""

    QKV = "qkv"
    O = "o"  # noqa: E741 - the projection's name
    GATE_UP = "gate_up"
    DOWN = "down"
    ROUTER = "router"  # of experts
    EXPERTS = "experts"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One stored tensor of a layer, `<layer>.<suffix>` in the checkpoint, plain, packed or grouped.

    `out_axis`, `in_axis`: the axes along outputs and inputs, or None. A unit is the features per index of the axis
    (8 for eight 4-bit values in an int32).
    """

    suffix: str
    dtype: torch.dtype
    out_axis: int | None
    in_axis: int | None
    out_unit: int = 1
    in_unit: int = 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The tensor's shape for these feature counts."""
        axes = {self.out_axis: -(-out_features // self.out_unit), self.in_axis: -(-in_features // self.in_unit)}
        return tuple(size for axis, size in sorted((a, s) for a, s in axes.items() if a is not None))

    @property
    def stored(self) -> tuple[str, ...]:
        """Checkpoint dtypes, as safetensors spells them; floats are cast."""
        return STORED_FLOATS if self.dtype in _CAST else (_EXACT[self.dtype],)

    @property
    def finite(self) -> bool:
        """Whether to check for NaN and infinity."""
        return self.dtype.is_floating_point and self.dtype.itemsize > 1

    def index(self, outputs: slice, inputs: slice) -> tuple[slice, ...]:
        """The part with these feature ranges. Raises ValueError if they split a unit."""
        axes = {self.out_axis: (outputs, self.out_unit), self.in_axis: (inputs, self.in_unit)}
        index = []
        for axis, (features, unit) in sorted((a, f) for a, f in axes.items() if a is not None):
            if features.start % unit or features.stop % unit:
                raise ValueError(
                    f"{self.suffix} axis {axis} stores {unit} features together and cannot be cut at "
                    f"{features.start}..{features.stop}"
                )
            index.append(slice(features.start // unit, features.stop // unit))
        return tuple(index)


class QuantizedActivation(NamedTuple):
    """A layer's input in low precision."""

    values: torch.Tensor  # [T, M]
    scale: torch.Tensor  # broadcasts to [T, M]


class LinearMethod(Protocol):
    """Storage and GEMM of a layer's weight. `weights` maps suffixes to tensors."""

    def specs(self, dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        """The tensors to allocate and load, for compute dtype `dtype`."""
        ...

    def prepare(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that `apply` reads, made once; the loaded ones are then freed."""
        ...

    def apply(self, weights: Mapping[str, torch.Tensor], x: Any, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, M], or `input_quantizer`'s result -> [T, N]. weights: from `prepare`."""
        ...

    def apply_gated(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, activation: str, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, M] -> [T, N], act(gate) * up: 2N outputs, gate first. Override it if one kernel does both."""
        return silu_mul(self.apply(weights, x, bias), activation)

    def input_quantizer(self) -> Callable[[torch.Tensor], QuantizedActivation] | None:
        """Applied to the norm's result before QKV and GATE_UP layers; None: `apply` reads a plain tensor."""
        return None

    def prepare_experts(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`prepare` for stacked tensors [experts, ...] that `apply_experts` reads."""
        return dict(weights)

    def apply_experts(
        self,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        """x [T, M] -> [T, M]: the sum of the experts `chosen` [T, top_k], times `weights` [T, top_k].

        Expert e's gated MLP is gate_up[e] [2N, M], then down[e] [M, N].
        """
        ...


# (name, kind) -> method. name: without the checkpoint's prefix, such as layers.3.self_attn.qkv_proj.
MethodFor = Callable[[str, LayerKind], LinearMethod]
