"""Self-attention on the paged KV cache, and the inputs that all layers of a step share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels.attention.kv_store import rope_kv_store, store_rows
from ...kernels.attention.paged_decode import DecodeIndex, decode_index, decode_tables, paged_decode
from ...kernels.attention.paged_prefill import PrefillSlice, paged_prefill, prefill_index
from ...kernels.attention.rope import RopeRows
from ...kernels.attention.tables import DecodeTables, PrefillTables
from ...kernels.backend import Backend, backend_of
from ...kernels.linear.rms_norm import rms_norm
from ...quant.methods.linear_method import LayerKind, MethodFor
from ..errors import ConfigError
from ..kv_cache_spec import KVCacheSpec
from ..model_spec import DecoderSpec, LayerSpec, QKNorm
from ..parallel.comm import ParallelContext
from .batch import FEW_DECODES, AttentionMetadata
from .kv_cache import KVCache
from .linear import QKVLinear, RowParallelLinear
from .norm import RMSNorm
from .weights import Layer, WeightSlot


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """Inputs that a step's layers share, made once per forward.

    Keys of `decode` and `prefill` are windows (None: the whole context), of `ropes` rope names.
    torch operators read indices made on the host, Triton kernels the metadata's tensors.

    Batch-invariant steps decode nothing. They prefill slices of one token too, so that a token's
    bits do not depend on slices or neighbours.
    """

    store: torch.Tensor  # from store_rows: cache rows to write
    decode: Mapping[int | None, DecodeIndex | DecodeTables]  # empty without decode slices
    prefill: Mapping[int | None, Sequence[Sequence[PrefillSlice] | PrefillTables]]  # in launch order
    ropes: Mapping[str | None, RopeRows]

    @classmethod
    def make(
        cls,
        metadata: AttentionMetadata,
        ropes: Mapping[str | None, RopeRows],
        windows: Sequence[int | None],
        kv_cache: KVCacheSpec,
        *,
        dtype: torch.dtype,
        batch_invariant: bool = False,
    ) -> AttentionStep:
        """The inputs of layers with these windows. dtype: of the queries."""
        shape = {"num_kv_heads": kv_cache.num_kv_heads, "block_size": kv_cache.block_size}
        on_torch = backend_of(metadata.slot_mapping) is Backend.TORCH
        lens, tables = metadata.decode_lens, metadata.decode_tables
        cuts = [(metadata.prefill_starts, metadata.prefill_lens, metadata.prefill_tables)]
        decode: dict[int | None, DecodeIndex | DecodeTables] = {}
        # The graph shape of few sequences beside a prefill often holds one and padding (graphs.py). A long context in
        # one program is slow: 8192 tokens take 100 us a layer on an H200, seven times the need.
        few = len(metadata.prefill_lens) and len(lens) <= FEW_DECODES
        expected = max(1, len(lens) // 8) if few else len(lens)
        if batch_invariant:
            # In a CUDA graph only the device has the number of real entries; a separate launch skips padding.
            cuts.append((torch.arange(len(lens) + 1, dtype=torch.int32, device=lens.device), lens, tables))
        elif len(lens):
            for window in windows:
                if on_torch:
                    decode[window] = decode_index(
                        lens, tables, head_dim=kv_cache.head_dim, window=window, dtype=dtype, **shape
                    )
                else:
                    decode[window] = decode_tables(lens, tables, window=window, num_expected=expected, **shape)

        def prefills(window: int | None) -> Iterator[tuple[PrefillSlice, ...] | PrefillTables]:
            for starts, lens, tables in cuts:
                if len(lens) and on_torch:
                    on_host = starts.tolist(), lens.tolist(), tables
                    yield prefill_index(*on_host, window=window, dtype=dtype, invariant=batch_invariant, **shape)
                elif len(lens):
                    yield PrefillTables(starts, lens, tables, window)

        prefill = {window: tuple(prefills(window)) for window in windows}
        return cls(store_rows(metadata.slot_mapping, **shape), decode, prefill, ropes)


class Attention(Layer):
    """x [T, hidden] -> [T, hidden], this rank's partial sum.

    First writes the step's keys and values to layer `index` of the rank's cache. number: the
    layer's in the model.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        layer: LayerSpec,
        index: int,
        number: int,
        comm: ParallelContext,
        method_for: MethodFor,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        heads, kv_heads, head_dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.layer, self.index, self.head_dim, self.qk_norm = layer, index, head_dim, spec.qk_norm
        self.scale = head_dim**-0.5 if spec.attention_scale is None else spec.attention_scale
        self.softcap, self.eps = spec.attention_softcap, spec.rms_norm_eps
        name = f"layers.{number}.self_attn"
        self.qkv_proj = QKVLinear(
            spec.hidden_size, heads, kv_heads, head_dim, comm,
            bias=spec.qkv_bias, method=method_for(f"{name}.qkv_proj", LayerKind.QKV), dtype=dtype, device=device,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            heads * head_dim, spec.hidden_size, "o_proj", comm,
            bias=spec.o_bias, method=method_for(f"{name}.o_proj", LayerKind.O), dtype=dtype, device=device,
        )  # fmt: skip
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.q_norm = self.k_norm = None
        if spec.qk_norm is not QKNorm.NONE:
            whole = spec.qk_norm is QKNorm.PROJECTION
            if whole and comm.tp_size > kv_heads:
                raise ConfigError(
                    f"tensor_parallel_size {comm.tp_size} is above the {kv_heads} kv heads, which this model's norm of "
                    "the whole key projection does not allow; lower it"
                )
            sizes = (heads * head_dim, kv_heads * head_dim) if whole else (head_dim, head_dim)
            self.q_norm, self.k_norm = (
                RMSNorm(size, spec.rms_norm_eps, dtype=dtype, device=device, offset=spec.norm_offset) for size in sizes
            )
        self.comm = comm

    def forward(self, x: torch.Tensor, step: AttentionStep, cache: KVCache) -> torch.Tensor:
        qkv, num_heads = self.qkv_proj(x), self.num_heads
        num_tokens = qkv.shape[0]
        qkv = qkv.view(num_tokens, -1, self.head_dim)
        q_norm = k_norm = None
        if self.qk_norm is QKNorm.HEAD:
            q_norm, k_norm = self._norm_weights()
        elif self.qk_norm is QKNorm.PROJECTION:
            self._normalize(qkv)
        kv_cache, rope = cache.layers[self.index], step.ropes[self.layer.rope]
        rope_kv_store(qkv, num_heads, rope, kv_cache, step.store, q_norm=q_norm, k_norm=k_norm, eps=self.eps)
        return self.o_proj(self._attend(qkv[:, :num_heads], kv_cache, step).view(num_tokens, -1))

    def _attend(self, q: torch.Tensor, cache: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        window = self.layer.window
        if step.decode:
            paged_decode(q, cache, step.decode[window], scale=self.scale, softcap=self.softcap, out=out)
        for slices in step.prefill[window]:
            paged_prefill(q, cache, slices, scale=self.scale, softcap=self.softcap, out=out)
        return out

    def _norm_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm.weight, self.k_norm.weight

    def _normalize(self, qkv: torch.Tensor) -> None:
        """Norm all queries and all keys, in place in qkv [T, H + 2 KV, D]."""
        q, k = qkv[:, : self.num_heads], qkv[:, self.num_heads : self.num_heads + self.num_kv_heads]
        for part, weight in zip((q, k), self._norm_weights(), strict=True):
            part.copy_(self._norm_whole(part, weight))

    def _norm_whole(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One mean over all heads: each rank norms the gathered projection and keeps its heads."""
        num_tokens, heads, _ = x.shape
        whole = rms_norm(self.comm.all_gather(x.reshape(num_tokens, -1)), weight, self.eps)
        first = self.comm.tp_rank * heads
        return whole.view(num_tokens, -1, self.head_dim)[:, first : first + heads]

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from self.qkv_proj.weight_slots(prefix)
        yield from self.o_proj.weight_slots(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.weight_slots(f"{prefix}.q_norm")
            yield from self.k_norm.weight_slots(f"{prefix}.k_norm")
