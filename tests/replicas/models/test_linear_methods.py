"""A method per layer: a toy scheme serves some layers by name or kind, experts and head included."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.quant.methods.linear_method import LayerKind, LinearMethod, MethodFor, QuantizedActivation, WeightSpec
from shoal.quant.methods.unquantized import UnquantizedLinear
from shoal.replicas.errors import ModelError
from shoal.replicas.models.loader import load_model
from tests.support.checkpoints import FAMILIES
from tests.support.paged import CPU, PagedModel, engine_config

PROMPT = list(range(2, 30))
PLAIN = UnquantizedLinear()
Weights = Mapping[str, torch.Tensor]


class Int8Weights(UnquantizedLinear):
    """int8 weights [N, M] with a scale for each output, dequantised as they are loaded."""

    def specs(self, dtype: torch.dtype) -> tuple[WeightSpec, ...]:
        scale = WeightSpec("weight_scale", torch.float32, out_axis=0, in_axis=None)
        return WeightSpec("weight", torch.int8, out_axis=0, in_axis=1), scale

    def prepare(self, weights: Weights) -> dict[str, torch.Tensor]:
        return super().prepare(self.prepare_experts(weights))

    def prepare_experts(self, weights: Weights) -> dict[str, torch.Tensor]:
        return {"weight": weights["weight"] * weights["weight_scale"][..., None]}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.abs().amax(-1) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def methods(chosen: Callable[[str, LayerKind], bool], method: LinearMethod) -> MethodFor:
    return lambda name, kind: method if chosen(name, kind) else PLAIN


# family, the layers that the scheme serves, their tensors in the checkpoint
CASES = [
    ("llama", lambda name, kind: name.startswith("layers.1."), r"layers\.1\..*_proj\.weight$"),
    ("llama", lambda name, kind: kind is LayerKind.HEAD, r"^lm_head\.weight$"),
    ("qwen3_moe", lambda name, kind: kind is LayerKind.EXPERTS, r"\.experts\.\d+\.\w+\.weight$"),
    ("mixtral", lambda name, kind: name.endswith(("mlp.experts", "mlp.gate")), r"block_sparse_moe\..*\.weight$"),
]


def rewrite(folder: Path, pattern: str, change: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> int:
    """Replace each tensor that matches by those that `change` makes, by suffix; the number of them."""
    tensors = {}
    changed = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        if re.search(pattern, name):
            tensors |= {name.removesuffix("weight") + suffix: value for suffix, value in change(tensor).items()}
            changed += 1
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return changed


@pytest.mark.parametrize(("family", "chosen", "pattern"), CASES)
def test_a_scheme_of_some_layers_equals_the_dense_model(family, chosen, pattern, tmp_path):
    dense, stored = FAMILIES[family](tmp_path / "dense"), FAMILIES[family](tmp_path / "stored")

    def dequantized(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        values, scale = quantize(weight)
        return {"weight": values * scale[:, None]}

    assert rewrite(dense, pattern, dequantized)
    assert rewrite(stored, pattern, lambda weight: dict(zip(("weight", "weight_scale"), quantize(weight), strict=True)))
    expected = PagedModel(dense).logits([(0, PROMPT)])
    logits = PagedModel(stored, method_for=methods(chosen, Int8Weights())).logits([(0, PROMPT)])
    torch.testing.assert_close(logits, expected)


def test_a_stored_dtype_that_the_method_does_not_read_is_named(tmp_path):
    folder = FAMILIES["llama"](tmp_path)
    scale = {"weight_scale": torch.ones(96)}
    rewrite(folder, r"layers\.1\.mlp\.up_proj\.weight$", lambda weight: {"weight": weight, **scale})
    method_for = methods(lambda name, kind: name == "layers.1.mlp.gate_up_proj", Int8Weights())
    rewrite(folder, r"layers\.1\.mlp\.gate_proj\.weight$", lambda weight: {"weight": weight.to(torch.int8), **scale})
    with pytest.raises(ModelError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight has dtype F32; expected I8"):
        load_model(engine_config(folder), CPU, method_for=method_for)


def per_token(x: torch.Tensor) -> QuantizedActivation:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return QuantizedActivation((x / scale).round().to(torch.int8), scale)


class QuantizedInput(UnquantizedLinear):
    """Reads int8 activations that the norm before it has made."""

    def input_quantizer(self) -> Callable[[torch.Tensor], QuantizedActivation]:
        return per_token

    def apply(self, weights: Weights, x: QuantizedActivation, bias: torch.Tensor | None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().apply(weights, x.values * x.scale, bias)

    apply_gated = LinearMethod.apply_gated


class QuantizesItself(QuantizedInput):
    """Reads plain activations, with the same loss."""

    def input_quantizer(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None

    def apply(self, weights: Weights, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().apply(weights, per_token(x), bias)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_a_norm_quantizes_for_the_layer_after_it(family, tmp_path):
    folder = FAMILIES[family](tmp_path)

    def chosen(name: str, kind: LayerKind) -> bool:
        return kind in (LayerKind.QKV, LayerKind.GATE_UP)

    by_norm, by_itself = (
        PagedModel(folder, method_for=methods(chosen, method)).logits([(0, PROMPT)])
        for method in (QuantizedInput(), QuantizesItself())
    )
    assert torch.equal(by_norm, by_itself)
    assert not torch.equal(by_norm, PagedModel(folder).logits([(0, PROMPT)]))
