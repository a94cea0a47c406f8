"""Linear layers split over tensor-parallel ranks.

A layer has one or more parts, stacked along the outputs, stored apart (`q_proj`, `k_proj`) or fused
(`qkv_proj`). Column-parallel ranks hold a range of every part's outputs. Row-parallel ranks hold a
range of the inputs and return partial sums. The LinearMethod stores and multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...quant.methods.linear_method import LinearMethod
from ..errors import ConfigError
from ..parallel.comm import ParallelContext
from .weights import Layer, Source, WeightSlot, empty_parameter


@dataclass(frozen=True, slots=True)
class Part:
    """A stacked projection: its checkpoint name, its outputs, and the rank's range of them."""

    name: str
    size: int
    local: slice

    @property
    def local_size(self) -> int:
        return self.local.stop - self.local.start


def shard_range(size: int, rank: int, num_shards: int, what: str) -> slice:
    """Rank `rank`'s equal range of `size`. Raises ConfigError if the split is uneven."""
    if size % num_shards:
        raise ConfigError(f"tensor_parallel_size {num_shards} does not divide the {size} {what} of a layer")
    share = size // num_shards
    return slice(rank * share, (rank + 1) * share)


def kv_head_range(num_kv_heads: int, comm: ParallelContext) -> slice:
    """The rank's kv heads; with fewer heads than ranks, neighbouring ranks replicate one."""
    if comm.tp_size <= num_kv_heads:
        return shard_range(num_kv_heads, comm.tp_rank, comm.tp_size, "kv heads")
    if comm.tp_size % num_kv_heads:
        raise ConfigError(f"tensor_parallel_size {comm.tp_size} is not a multiple of the {num_kv_heads} kv heads")
    head = comm.tp_rank // (comm.tp_size // num_kv_heads)
    return slice(head, head + 1)


class ParallelLinear(Layer):
    """x [..., local inputs] -> [..., local outputs], without communication.

    `fused_name` is the checkpoint's name for all parts in one tensor.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
        inputs: slice | None = None,
        fused_name: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.inputs = inputs or slice(0, in_features)
        self.parts = tuple(parts)
        self.method = method
        self.specs = method.specs(dtype)
        self.fused_name = fused_name
        local_out, local_in = sum(part.local_size for part in parts), self.inputs.stop - self.inputs.start
        self.weights = nn.ParameterDict(
            {spec.suffix: empty_parameter(spec.shape(local_out, local_in), spec.dtype, device) for spec in self.specs}
        )
        self.bias = empty_parameter((local_out,), dtype, device) if bias else None
        self._operands: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self._operands, x, self.bias)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """act(gate) * up, for a layer whose two parts are gate and up."""
        return self.method.apply_gated(self._operands, x, activation, self.bias)

    def prepare(self) -> None:
        """Call once the weights are loaded."""
        self._operands = self.method.prepare(dict(self.weights.items()))
        self.weights.clear()

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """`prefix`: the module that the parts belong to."""
        total = sum(part.size for part in self.parts)
        start_local = start_full = 0
        for part in self.parts:
            outputs = slice(start_local, start_local + part.local_size)
            fused = slice(start_full + part.local.start, start_full + part.local.stop)
            start_local, start_full = start_local + part.local_size, start_full + part.size
            for spec in self.specs:
                target = self.weights[spec.suffix][spec.index(outputs, slice(0, self.inputs.stop - self.inputs.start))]
                own = spec.index(part.local, self.inputs), spec.shape(part.size, self.in_features)
                whole = spec.index(fused, self.inputs), spec.shape(total, self.in_features)
                yield WeightSlot.of(spec, target, self._sources(prefix, part, spec.suffix, own, whole))
            if self.bias is not None:
                own, whole = ((part.local,), (part.size,)), ((fused,), (total,))
                yield WeightSlot(self.bias[outputs], self._sources(prefix, part, "bias", own, whole))

    def _sources(
        self,
        prefix: str,
        part: Part,
        suffix: str,
        own: tuple[tuple[slice, ...], tuple[int, ...]],
        whole: tuple[tuple[slice, ...], tuple[int, ...]],
    ) -> tuple[Source, ...]:
        sources = [Source(f"{prefix}.{part.name}.{suffix}", own[1], own[0])]
        if self.fused_name is not None:
            sources.append(Source(f"{prefix}.{self.fused_name}.{suffix}", whole[1], whole[0]))
        return tuple(sources)


class ColumnParallelLinear(ParallelLinear):
    """Splits the outputs of one or more parts over the ranks."""

    def __init__(
        self,
        in_features: int,
        sizes: dict[str, int],
        comm: ParallelContext,
        *,
        bias: bool,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
        fused_name: str | None = None,
    ) -> None:
        parts = [
            Part(name, size, shard_range(size, comm.tp_rank, comm.tp_size, f"outputs of {name}"))
            for name, size in sizes.items()
        ]
        super().__init__(
            in_features, parts, bias=bias, method=method, dtype=dtype, device=device, fused_name=fused_name
        )


class QKVLinear(ParallelLinear):
    """Queries, keys and values in one GEMM: [..., (H + 2 KV) * D] with this rank's heads."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        comm: ParallelContext,
        *,
        bias: bool,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        q_heads = shard_range(num_heads, comm.tp_rank, comm.tp_size, "query heads")
        kv_heads = kv_head_range(num_kv_heads, comm)
        queries = slice(q_heads.start * head_dim, q_heads.stop * head_dim)
        pairs = slice(kv_heads.start * head_dim, kv_heads.stop * head_dim)
        self.num_heads = q_heads.stop - q_heads.start
        self.num_kv_heads = kv_heads.stop - kv_heads.start
        parts = (
            Part("q_proj", num_heads * head_dim, queries),
            Part("k_proj", num_kv_heads * head_dim, pairs),
            Part("v_proj", num_kv_heads * head_dim, pairs),
        )
        super().__init__(
            hidden_size, parts, bias=bias, method=method, dtype=dtype, device=device, fused_name="qkv_proj"
        )


class RowParallelLinear(ParallelLinear):
    """Splits the inputs: each rank returns a partial sum, and only rank 0 adds the bias. The next
    norm does the all-reduce.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        name: str,
        comm: ParallelContext,
        *,
        bias: bool,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        inputs = shard_range(in_features, comm.tp_rank, comm.tp_size, f"inputs of {name}")
        parts = (Part(name, out_features, slice(0, out_features)),)
        super().__init__(in_features, parts, bias=bias, method=method, dtype=dtype, device=device, inputs=inputs)
        self._adds_bias = comm.tp_rank == 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self._operands, x, self.bias if self._adds_bias else None)
