"""The mixture-of-experts MLP: each expert is split along its intermediate features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from ...kernels.moe.moe import route
from ...quant.methods.linear_method import LayerKind, MethodFor
from ..model_spec import DecoderSpec, ExpertsSpec
from ..parallel.comm import ParallelContext
from .linear import ParallelLinear, Part, shard_range
from .weights import Layer, Source, WeightSlot, empty_parameter


class MoE(Layer):
    """x [T, hidden] -> [T, hidden], this rank's partial sum.

    Reads three checkpoint layouts: Mixtral's (`block_sparse_moe.experts.N.w1`, `w3`, `w2`), Qwen's
    (`mlp.experts.N.gate_proj`, `up_proj`, `down_proj`) and stacked (`mlp.experts.gate_up_proj`,
    `down_proj`).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        experts: ExpertsSpec,
        number: int,
        comm: ParallelContext,
        method_for: MethodFor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.experts, self.activation, self.hidden_size = experts, spec.hidden_act, spec.hidden_size
        self.local = shard_range(experts.intermediate_size, comm.tp_rank, comm.tp_size, "features of an expert")
        self.method = method_for(f"layers.{number}.mlp.experts", LayerKind.EXPERTS)
        self.specs = self.method.specs(dtype)
        self.gate = ParallelLinear(
            spec.hidden_size,
            [Part("gate", experts.num_experts, slice(0, experts.num_experts))],
            bias=False,
            method=method_for(f"layers.{number}.mlp.gate", LayerKind.ROUTER),
            dtype=dtype,
            device=device,
        )
        size = self.local.stop - self.local.start

        def stacked(outputs: int, inputs: int) -> nn.ParameterDict:
            shapes = {one.suffix: ((experts.num_experts, *one.shape(outputs, inputs)), one.dtype) for one in self.specs}
            return nn.ParameterDict({name: empty_parameter(*sized, device) for name, sized in shapes.items()})

        self.gate_up, self.down = stacked(2 * size, spec.hidden_size), stacked(spec.hidden_size, size)
        self._operands: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = {}, {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = route(self.gate(x), self.experts.top_k, renormalize=self.experts.renormalize)
        return self.method.apply_experts(*self._operands, x, weights, chosen, self.activation)

    def prepare(self) -> None:
        """Call once the weights are loaded; the gate prepares itself."""
        prepare = self.method.prepare_experts
        self._operands = prepare(dict(self.gate_up.items())), prepare(dict(self.down.items()))
        self.gate_up.clear()
        self.down.clear()

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """`prefix` ends in `.mlp`."""
        mixtral = prefix.removesuffix(".mlp") + ".block_sparse_moe"
        for own, other in zip(self.gate.weight_slots(prefix), self.gate.weight_slots(mixtral), strict=True):
            yield replace(own, sources=own.sources + other.sources)
        full, hidden, local = self.experts.intermediate_size, self.hidden_size, self.local
        size = local.stop - local.start
        every, up_rows = slice(0, hidden), slice(full + local.start, full + local.stop)
        first, second = slice(0, size), slice(size, 2 * size)
        # target tensor and part; then name(s), part and shape: of one expert, of stacked experts
        parts = (
            (self.gate_up, (first, every), "gate_proj", "w1", (local, every), (full, hidden),
             "gate_up_proj", (local, every), (2 * full, hidden)),
            (self.gate_up, (second, every), "up_proj", "w3", (local, every), (full, hidden),
             "gate_up_proj", (up_rows, every), (2 * full, hidden)),
            (self.down, (every, first), "down_proj", "w2", (every, local), (hidden, full),
             "down_proj", (every, local), (hidden, full)),
        )  # fmt: skip
        for e in range(self.experts.num_experts):
            for tensors, target, name, mixtral_name, own, sizes, stacked_name, stacked, stacked_sizes in parts:
                for spec in self.specs:
                    shape, index = spec.shape(*sizes), spec.index(*own)
                    sources = [
                        Source(f"{prefix}.experts.{e}.{name}.{spec.suffix}", shape, index),
                        Source(f"{mixtral}.experts.{e}.{mixtral_name}.{spec.suffix}", shape, index),
                    ]
                    if spec.suffix == "weight":
                        whole = (self.experts.num_experts, *spec.shape(*stacked_sizes))
                        sources.append(Source(f"{prefix}.experts.{stacked_name}", whole, (e, *spec.index(*stacked))))
                    yield WeightSlot.of(spec, tensors[spec.suffix][e][spec.index(*target)], tuple(sources))
