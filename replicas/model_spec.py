"""A decoder as data: families.py makes a DecoderSpec from config.json, decoder.py builds it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class QKNorm(Enum):
    """Norms of queries and keys before RoPE."""

    NONE = "none"
    HEAD = "head"  # per head, weight [head_dim] (Qwen3, Gemma 3)
    PROJECTION = "projection"  # all heads together (OLMo 2)


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture-of-experts MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool  # the top-k weights sum to one


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Properties that may differ between layers."""

    window: int | None = None  # sliding window in tokens, with the query's own
    rope: str | None = None  # layer type of its rope parameters; None: the model has one set
    experts: ExpertsSpec | None = None


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer, with Hugging Face's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    layers: tuple[LayerSpec, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    norm_offset: float = 0.0  # 1: norms are x * (1 + w)
    # Names of the norms in the checkpoint; None: no norm there.
    attention_pre_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_pre_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Distinct widths of dense MLPs and of one expert."""
        widths = (layer.experts.intermediate_size if layer.experts else self.intermediate_size for layer in self.layers)
        return tuple(dict.fromkeys(widths))

    @property
    def mlp_features(self) -> tuple[int, ...]:
        """Intermediate features of each layer, summed over its experts."""
        return tuple(
            layer.experts.num_experts * layer.experts.intermediate_size if layer.experts else self.intermediate_size
            for layer in self.layers
        )
