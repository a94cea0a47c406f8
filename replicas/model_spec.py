"""What a decoder is, as data: a family turns its Hugging Face config into a DecoderSpec, and decoder.py builds it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class QKNorm(Enum):
    """Norms of queries and keys before the rotary embedding."""

    NONE = "none"
    HEAD = "head"  # each head by itself, one weight of head_dim (Qwen3, Gemma 3)
    PROJECTION = "projection"  # all heads together (OLMo 2)


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """A mixture-of-experts MLP in place of a dense one."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool  # the chosen experts' weights sum to one


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None = None  # sliding window in tokens, the query's own included
    rope: str | None = None  # the layer type whose rope parameters apply; None: the model's only ones
    experts: ExpertsSpec | None = None


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer. Names follow Hugging Face configs where they have one."""

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
    # Names of the norms in the checkpoint; None: there is none at that place.
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
        """The distinct widths of the MLPs: of dense ones, and of one expert."""
        widths = (layer.experts.intermediate_size if layer.experts else self.intermediate_size for layer in self.layers)
        return tuple(dict.fromkeys(widths))

    @property
    def mlp_features(self) -> tuple[int, ...]:
        """Intermediate features of each layer, summed over its experts."""
        return tuple(
            layer.experts.num_experts * layer.experts.intermediate_size if layer.experts else self.intermediate_size
            for layer in self.layers
        )
