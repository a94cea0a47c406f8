"""The method of plain weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...kernels.linear.gemm import gated_linear, linear
from ...kernels.linear.silu_mul import silu_mul
from ...kernels.moe.moe import moe_mlp
from .linear_method import LinearMethod, WeightSpec
from .onednn import can_pack, linear_packed, pack


class UnquantizedLinear(LinearMethod):
    """A plain weight [N, M] in the model's dtype.

    batch_invariant: a token has the same bits in any batch on a GPU; on CPU it always does.

    On CPU the weight is `packed` in oneDNN's blocked layout, twice as fast for few tokens as
    torch.nn.functional.linear. All GEMMs of an 8 M parameter decoder on two cores (fp32, AVX-512), ms plain /
    packed: 1 token 1.8 / 1.0, 8 tokens 2.6 / 1.35, 32 tokens 5.8 / 2.0.
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

    def apply_experts(
        self,
        gate_up: Mapping[str, torch.Tensor],
        down: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        return moe_mlp(x, gate_up["weight"], down["weight"], weights, chosen, activation, invariant=self._invariant)
