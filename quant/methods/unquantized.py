"""How a linear layer keeps its weight and multiplies by it: one LinearMethod per storage scheme.

A layer knows its feature counts and how tensor parallelism splits them; a method knows which tensors stand for the
weight. `WeightSpec` is the contract between the two: it says how a tensor's axes follow the layer's output and input
features, so that one piece of shard arithmetic serves packed, grouped and plain weights alike.

Legend: M features in, N features out (of the whole layer or of a rank's part).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ...kernels.linear.gemm import gated_linear, linear
from ...kernels.linear.silu_mul import silu_mul
from .onednn import can_pack, linear_packed, pack


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One stored tensor of a linear layer, called `<layer>.<suffix>` in the checkpoint.

    `out_axis` and `in_axis` name the axes that run along the layer's outputs and inputs (None: the tensor does not);
    a unit is the number of features that one index of the axis stands for (8 for eight 4-bit values in an int32).
    """

    suffix: str
    dtype: torch.dtype
    out_axis: int | None
    in_axis: int | None
    out_unit: int = 1
    in_unit: int = 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The tensor's shape for a layer, or a part of one, of these sizes."""
        axes = {self.out_axis: -(-out_features // self.out_unit), self.in_axis: -(-in_features // self.in_unit)}
        return tuple(size for axis, size in sorted((a, s) for a, s in axes.items() if a is not None))

    def index(self, outputs: slice, inputs: slice) -> tuple[slice, ...]:
        """The part of the tensor that holds these feature ranges. Raises ValueError where they split a unit."""
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


class LinearMethod(Protocol):
    """Storage and product of one linear layer's weight. `weights` maps a spec's suffix to its tensor."""

    def specs(self, dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        """The tensors to allocate and to load, for a model that computes in `dtype`."""
        ...

    def prepare(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that `apply` multiplies by, made once from the loaded ones, which are then let go."""
        ...

    def apply(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [T, M] -> [T, N], with the tensors that `prepare` returned."""
        ...

    def apply_gated(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, activation: str, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [T, M] -> [T, N], act(gate) * up, of a weight whose 2N outputs are the gate's and then up's.

        A method that has the two in one kernel says so here.
        """
        return silu_mul(self.apply(weights, x, bias), activation)


class UnquantizedLinear(LinearMethod):
    """A plain weight [N, M] in the model's dtype.

    With `batch_invariant` a token's result on a GPU has the same bits in any batch (kernels/linear/gemm.py). On the
    CPU it has them always.

    On CPU it is kept in oneDNN's blocked layout, as `packed`: torch.nn.functional.linear takes a row-major weight and
    leaves half of the speed for few tokens. All products of an 8 M parameter decoder on two cores (fp32, AVX-512), in
    ms, plain / packed: 1 token 1.8 / 1.0, 8 tokens 2.6 / 1.35, 32 tokens 5.8 / 2.0.
    """

    def __init__(self, batch_invariant: bool = False) -> None:
        self._invariant = batch_invariant

    def specs(self, dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        return (WeightSpec("weight", dtype, out_axis=0, in_axis=1),)

    def prepare(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = weights["weight"]
        if not can_pack(weight):
            return {"weight": weight}
        return {"packed": pack(weight)}

    def apply(self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        packed = weights.get("packed")
        if packed is None:
            return linear(x, weights["weight"], bias, invariant=self._invariant)
        return linear_packed(x, packed, bias)

    def apply_gated(
        self, weights: Mapping[str, torch.Tensor], x: torch.Tensor, activation: str, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if "packed" in weights:
            return silu_mul(self.apply(weights, x, bias), activation)
        return gated_linear(x, weights["weight"], activation, bias, invariant=self._invariant)
