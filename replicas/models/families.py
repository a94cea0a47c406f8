"""The families of models that are understood: how each one's Hugging Face config becomes a DecoderSpec.

A family is a function from the config (of transformers' AutoConfig; the text part of a multimodal one) to the spec,
and says only what differs from Llama.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ...kernels.linear.silu_mul import ACTIVATIONS
from ..errors import ModelError
from ..model_spec import DecoderSpec, ExpertsSpec, LayerSpec, QKNorm
from .checkpoint import family_of


def _llama(config: Any) -> DecoderSpec:
    heads = config.num_attention_heads
    attention_bias = bool(getattr(config, "attention_bias", False))
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=getattr(config, "hidden_act", None) or config.hidden_activation,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        layers=(LayerSpec(),) * config.num_hidden_layers,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
    )


def _mistral(config: Any) -> DecoderSpec:
    """A sliding window in every layer, or none. Phi-3 and Mixtral have the same."""
    return replace(_llama(config), layers=(LayerSpec(window=config.sliding_window),) * config.num_hidden_layers)


def _by_layer_type(config: Any, *, rope_by_type: bool = False) -> tuple[LayerSpec, ...]:
    """Windows, and ropes where each type has its own, by `config.layer_types`."""
    known = {"full_attention": None, "sliding_attention": config.sliding_window}
    unknown = set(config.layer_types) - known.keys()
    if unknown:
        raise ModelError(f"config.json has layers of type {sorted(unknown)}; only {sorted(known)} are supported")
    return tuple(LayerSpec(window=known[kind], rope=kind if rope_by_type else None) for kind in config.layer_types)


def _qwen2(config: Any) -> DecoderSpec:
    return replace(_llama(config), layers=_by_layer_type(config), qkv_bias=True)


def _qwen3(config: Any) -> DecoderSpec:
    return replace(_llama(config), layers=_by_layer_type(config), qk_norm=QKNorm.HEAD)


def _gemma2(config: Any) -> DecoderSpec:
    return replace(
        _llama(config),
        layers=_by_layer_type(config),
        norm_offset=1.0,
        attention_post_norm="post_attention_layernorm",
        mlp_pre_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        attention_scale=config.query_pre_attn_scalar**-0.5,
        attention_softcap=config.attn_logit_softcapping,
        final_softcap=config.final_logit_softcapping,
        embedding_scale=config.hidden_size**0.5,
    )


def _gemma3(config: Any) -> DecoderSpec:
    if config.use_bidirectional_attention:
        raise ModelError("config.json sets use_bidirectional_attention: an encoder, which cannot generate tokens")
    return replace(_gemma2(config), layers=_by_layer_type(config, rope_by_type=True), qk_norm=QKNorm.HEAD)


def _mixtral(config: Any) -> DecoderSpec:
    experts = ExpertsSpec(
        config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, renormalize=True
    )
    layer = LayerSpec(window=config.sliding_window, experts=experts)
    return replace(_llama(config), layers=(layer,) * config.num_hidden_layers)


def _qwen3_moe(config: Any) -> DecoderSpec:
    experts = ExpertsSpec(
        config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, bool(config.norm_topk_prob)
    )
    sparse = LayerSpec(window=config.sliding_window, experts=experts)
    dense = replace(sparse, experts=None)
    layers = tuple(
        sparse if i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0 else dense
        for i in range(config.num_hidden_layers)
    )
    return replace(_llama(config), layers=layers, qk_norm=QKNorm.HEAD)


def _olmo2(config: Any) -> DecoderSpec:
    return replace(
        _llama(config),
        qk_norm=QKNorm.PROJECTION,
        attention_pre_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_pre_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
    )


# By the names that checkpoint.ARCHITECTURES gives to architectures.
FAMILIES: dict[str, Callable[[Any], DecoderSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _mistral,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmo2": _olmo2,
}


def decoder_spec(config: Any) -> DecoderSpec:
    """The spec of a Hugging Face text config. Raises ModelError for what no family here can express."""
    spec = FAMILIES[family_of(config.architectures, config.model_type)](config)
    if spec.hidden_act not in ACTIVATIONS:
        raise ModelError(f"activation {spec.hidden_act!r} is not supported; known: {', '.join(ACTIVATIONS)}")
    return spec
