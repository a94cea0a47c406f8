"""The mixture-of-experts MLP. Every rank holds all experts, each split along its intermediate features."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.linear.gemm import linear
from ...kernels.moe.moe import moe_mlp, route
from ..model_spec import DecoderSpec, ExpertsSpec
from ..parallel.comm import ParallelContext
from .linear import shard_range
from .weights import Index, Layer, Source, WeightSlot, empty_parameter


class MoE(Layer):
    """x [T, hidden] -> [T, hidden], the rank's part of a sum over the ranks.

    Checkpoints store experts in three ways, told apart by their tensor names: Mixtral's (`w1`, `w3`, `w2` of
    `block_sparse_moe.experts.N`), Qwen's (`gate_proj`, `up_proj`, `down_proj` of `mlp.experts.N`), and stacked over
    the experts (`mlp.experts.gate_up_proj`, `mlp.experts.down_proj`).
    """

    def __init__(
        self,
        spec: DecoderSpec,
        experts: ExpertsSpec,
        comm: ParallelContext,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__()
        self.batch_invariant = batch_invariant
        self.experts, self.activation, self.hidden_size = experts, spec.hidden_act, spec.hidden_size
        self.local = shard_range(experts.intermediate_size, comm.tp_rank, comm.tp_size, "features of an expert")
        size = self.local.stop - self.local.start
        self.gate = empty_parameter((experts.num_experts, spec.hidden_size), dtype, device)
        self.gate_up = empty_parameter((experts.num_experts, 2 * size, spec.hidden_size), dtype, device)
        self.down = empty_parameter((experts.num_experts, spec.hidden_size, size), dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = linear(x, self.gate, invariant=self.batch_invariant)
        weights, chosen = route(logits, self.experts.top_k, renormalize=self.experts.renormalize)
        return moe_mlp(x, self.gate_up, self.down, weights, chosen, self.activation, invariant=self.batch_invariant)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """`prefix` ends in `.mlp`; Mixtral's original name of the same module stands beside it."""
        mixtral = prefix.removesuffix(".mlp") + ".block_sparse_moe"
        shape = tuple(self.gate.shape)
        yield WeightSlot(self.gate, (Source(f"{prefix}.gate.weight", shape), Source(f"{mixtral}.gate.weight", shape)))
        full, hidden, local = self.experts.intermediate_size, self.hidden_size, self.local
        size = local.stop - local.start
        stacked = {
            "gate_up_proj": (self.experts.num_experts, 2 * full, hidden),
            "down_proj": (self.experts.num_experts, hidden, full),
        }
        up_rows = slice(full + local.start, full + local.stop)
        for e in range(self.experts.num_experts):
            parts: tuple[tuple[torch.Tensor, str, str, tuple[int, ...], Index, str, Index], ...] = (
                (self.gate_up[e, :size], "gate_proj", "w1", (full, hidden), (local,), "gate_up_proj", (e, local)),
                (self.gate_up[e, size:], "up_proj", "w3", (full, hidden), (local,), "gate_up_proj", (e, up_rows)),
                (self.down[e], "down_proj", "w2", (hidden, full), (slice(0, hidden), local), "down_proj",
                 (e, slice(0, hidden), local)),
            )  # fmt: skip
            for target, name, mixtral_name, own_shape, own_index, stacked_name, stacked_index in parts:
                yield WeightSlot(
                    target,
                    (
                        Source(f"{prefix}.experts.{e}.{name}.weight", own_shape, own_index),
                        Source(f"{mixtral}.experts.{e}.{mixtral_name}.weight", own_shape, own_index),
                        Source(f"{prefix}.experts.{stacked_name}", stacked[stacked_name], stacked_index),
                    ),
                )
