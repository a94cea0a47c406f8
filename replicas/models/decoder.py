"""The decoder of any DecoderSpec, or one rank's part of it.

A step's tokens form one row [T, hidden], without padding. The residual is one tensor, updated in
place. A layer returns what is still to be added. One kernel then does the all-reduce of partial
sums, the addition and the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...quant.methods.linear_method import LayerKind, LinearMethod, MethodFor
from ..kv_cache_spec import KVCacheSpec
from ..layers.attention import Attention, AttentionStep
from ..layers.batch import AttentionMetadata
from ..layers.embedding import OutputHead, VocabParallelEmbedding
from ..layers.kv_cache import KVCache
from ..layers.linear import ParallelLinear
from ..layers.mlp import GatedMLP
from ..layers.moe import MoE
from ..layers.norm import RMSNorm
from ..layers.rotary import RotaryEmbedding
from ..layers.weights import Layer, WeightSlot
from ..model_spec import DecoderSpec, LayerSpec
from ..parallel.comm import ParallelContext
from ..parallel.vocabulary import VocabularySlice
from ..stages import stage_layers


class DecoderLayer(Layer):
    """Attention and MLP, each with a norm before it, after it, or both."""

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
        """index: of the layer on this rank; number: in the model."""
        super().__init__()
        self.spec, self.layer_spec, self.comm = spec, layer, comm

        def norm(name: str | None) -> RMSNorm | None:
            if name is None:
                return None
            return RMSNorm(spec.hidden_size, spec.rms_norm_eps, dtype=dtype, device=device, offset=spec.norm_offset)

        self.attention_pre_norm = norm(spec.attention_pre_norm)
        self.attention_post_norm = norm(spec.attention_post_norm)
        self.mlp_pre_norm = norm(spec.mlp_pre_norm)
        self.mlp_post_norm = norm(spec.mlp_post_norm)
        self.self_attn = Attention(spec, layer, index, number, comm, method_for, dtype, device)
        if layer.experts is None:
            self.mlp = GatedMLP(spec, number, comm, method_for, dtype, device)
        else:
            self.mlp = MoE(spec, layer.experts, number, comm, method_for, dtype, device)
        # Bound once: plain tensors cost no check per step.
        self._enter_attention = _entry(self.self_attn.qkv_proj.method)
        self._enter_mlp = _entry(self.mlp.gate_up_proj.method if isinstance(self.mlp, GatedMLP) else None)

    def forward(
        self, pending: torch.Tensor | None, residual: torch.Tensor, step: AttentionStep, cache: KVCache
    ) -> torch.Tensor:
        """Add `pending` and the attention's result to `residual` [T, hidden]; return the MLP's, not
        yet added.
        """
        comm, spec = self.comm, self.spec
        x = self._enter_attention(self.attention_pre_norm, pending, residual, comm, partial=spec.mlp_post_norm is None)
        x = reduce_and_norm(self.attention_post_norm, self.self_attn(x, step, cache), comm)
        x = self._enter_mlp(self.mlp_pre_norm, x, residual, comm, partial=spec.attention_post_norm is None)
        return reduce_and_norm(self.mlp_post_norm, self.mlp(x), comm)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        for place in ("attention_pre_norm", "attention_post_norm", "mlp_pre_norm", "mlp_post_norm"):
            norm = getattr(self, place)
            if norm is not None:
                yield from norm.weight_slots(f"{prefix}.{getattr(self.spec, place)}")
        yield from self.self_attn.weight_slots(f"{prefix}.self_attn")
        yield from self.mlp.weight_slots(f"{prefix}.mlp")


def add_residual_and_norm(
    norm: RMSNorm | None, pending: torch.Tensor | None, residual: torch.Tensor, comm: ParallelContext, *, partial: bool
) -> torch.Tensor:
    """Add `pending` to the residual in place; return the sub-layer's input, normed if there is a
    norm.

    partial: `pending` is this rank's partial sum.
    """
    if pending is None:
        return residual if norm is None else norm(residual)
    if norm is not None and partial:
        return comm.all_reduce_add_rms_norm(pending, residual, norm.weight, norm.eps)
    if norm is not None:
        return norm(pending, residual)
    return residual.add_(comm.all_reduce(pending) if partial else pending)


def _entry(method: LinearMethod | None) -> Callable[..., Any]:
    """add_residual_and_norm, whose result is in the format that `method` reads."""
    quantize = None if method is None else method.input_quantizer()
    if quantize is None:
        return add_residual_and_norm
    return lambda *args, **kwargs: quantize(add_residual_and_norm(*args, **kwargs))


def reduce_and_norm(norm: RMSNorm | None, x: torch.Tensor, comm: ParallelContext) -> torch.Tensor:
    """A sub-layer's output, not yet added: a partial sum, or all-reduced and normed."""
    return x if norm is None else norm(comm.all_reduce(x))


class DecoderModel(Layer):
    """One rank's part of a model."""

    def __init__(
        self,
        spec: DecoderSpec,
        config: Any,
        comm: ParallelContext,
        method_for: MethodFor,
        *,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        batch_invariant: bool = False,
    ) -> None:
        """`config`: the Hugging Face text config, for its rope parameters.

        batch_invariant: a token has the same bits in any batch; the methods must support it too.
        """
        super().__init__()
        self.spec, self.comm, self.dtype, self.batch_invariant = spec, comm, dtype, batch_invariant
        self.layer_range = stage_layers(spec, comm.pp_size)[comm.pp_rank]
        own = [spec.layers[i] for i in self.layer_range]
        self.embed_tokens = self.lm_head = self.norm = None
        if comm.is_first_stage or (comm.is_last_stage and spec.tie_word_embeddings):
            self.embed_tokens = VocabParallelEmbedding(
                spec.vocab_size, spec.hidden_size, comm, dtype=dtype, device=device, scale=spec.embedding_scale
            )
        if comm.is_last_stage:
            self.norm = RMSNorm(
                spec.hidden_size, spec.rms_norm_eps, dtype=dtype, device=device, offset=spec.norm_offset
            )
            self.lm_head = OutputHead(
                VocabularySlice(spec.vocab_size, comm), spec.hidden_size, method_for("lm_head", LayerKind.HEAD),
                dtype=dtype, device=device, tied=self.embed_tokens if spec.tie_word_embeddings else None,
            )  # fmt: skip
        self.layers = nn.ModuleList(
            DecoderLayer(spec, spec.layers[number], index, number, comm, method_for, dtype, device)
            for index, number in enumerate(self.layer_range)
        )
        self.windows = tuple(dict.fromkeys(layer.window for layer in own))
        # In order rather than by name: a rope name may be None, which no module may have.
        self.rope_names = tuple(dict.fromkeys(layer.rope for layer in own))
        self.ropes = nn.ModuleList(
            RotaryEmbedding(config, spec.head_dim, max_model_len, device, name) for name in self.rope_names
        )

    def kv_cache_spec(self, block_size: int) -> KVCacheSpec:
        """The KV cache of this rank's layers."""
        first = self.layers[0]
        assert isinstance(first, DecoderLayer)
        dtype = str(self.dtype).removeprefix("torch.")
        return KVCacheSpec(len(self.layers), first.self_attn.num_kv_heads, block_size, self.spec.head_dim, dtype)

    @contextmanager
    def dedup_layers(self) -> Iterator[None]:
        """Inside, keep the first layer, which has no pending sum, and one layer of each other kind."""
        whole = self.layers
        kinds = {layer.layer_spec: layer for layer in whole[1:]}
        self.layers = nn.ModuleList([whole[0], *kinds.values()])
        try:
            yield
        finally:
            self.layers = whole

    @torch.inference_mode()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attention: AttentionMetadata,
        kv_cache: KVCache,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """int64 [T] ids and positions -> hidden states [T, hidden], normed on the last stage.

        `hidden` [T, hidden] is the previous stage's result; the first stage embeds input_ids
        instead.
        """
        if hidden is None:
            assert self.embed_tokens is not None, "a later pipeline stage needs the hidden states of the one before"
            residual = self.embed_tokens(input_ids)
        else:
            residual = hidden.clone()
        ropes = {
            name: rotary.rows(positions, self.dtype)  # pyright: ignore[reportCallIssue]
            for name, rotary in zip(self.rope_names, self.ropes, strict=True)
        }
        step = AttentionStep.make(
            attention, ropes, self.windows, kv_cache.spec, dtype=self.dtype, batch_invariant=self.batch_invariant
        )
        pending = None
        for layer in self.layers:
            pending = layer(pending, residual, step, kv_cache)
        return add_residual_and_norm(self.norm, pending, residual, self.comm, partial=self.spec.mlp_post_norm is None)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [K, hidden] of the last stage -> logits [K, size] of the rank's slice: fp32; on a
        GPU without a soft cap the model's dtype.
        """
        assert self.lm_head is not None, "only the last pipeline stage has the output head"
        logits = self.lm_head(hidden)
        cap = self.spec.final_softcap
        return logits if cap is None else logits.float().div_(cap).tanh_().mul_(cap)

    def prepare(self) -> None:
        """Call once the weights are loaded: linear layers take their final form."""
        for module in list(self.modules()):
            if isinstance(module, ParallelLinear | MoE | OutputHead):
                module.prepare()

    def weight_slots(self, prefix: str, head: str) -> Iterator[WeightSlot]:
        """This rank's weights. prefix, head: checkpoint names of decoder and output head."""
        if self.embed_tokens is not None:
            yield from self.embed_tokens.weight_slots(f"{prefix}embed_tokens")
        for index, layer in zip(self.layer_range, self.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weight_slots(f"{prefix}layers.{index}")
        if self.norm is not None:
            yield from self.norm.weight_slots(f"{prefix}norm")
        if self.lm_head is not None:
            yield from self.lm_head.weight_slots(head)
