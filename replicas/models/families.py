"""Model families: how each one's config.json becomes a DecoderSpec.

A family is one entry of FAMILIES: architectures, a function from the JSON to the spec, and
transformers' defaults for absent keys. Routers read specs too, so nothing here imports torch or
transformers; a test compares with AutoConfig.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..model_spec import DecoderSpec, ExpertsSpec, LayerSpec, QKNorm

# Far above any model: a larger value would allocate memory before the tensors are seen.
MAX_SIZE = 1 << 28
_LIMITS = {"num_hidden_layers": 4096, "hidden_size": 1 << 20, "num_attention_heads": 1 << 16, "head_dim": 1 << 16}


class TextConfig:
    """The language model's part of a config.json. Getters raise ModelError, naming file and key."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self._values = path, values

    def get(self, *keys: str) -> Any:
        """The first value among `keys` that is not null."""
        return next((self._values[key] for key in keys if self._values.get(key) is not None), None)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` if the key is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        limit = _LIMITS.get(key, MAX_SIZE)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise self.bad(key, value, f"a positive integer, at most {limit}")
        return value

    def number(self, key: str, default: float) -> float:
        value = default if self.get(key) is None else self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.bad(key, value, "a number")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.get(key) is None else self.integer(key)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key, 0.0)

    def flag(self, key: str) -> bool:
        return bool(self.get(key))

    def bad(self, key: str, value: object, expected: str) -> ModelError:
        return ModelError(f"{self.path}: {key} is {value!r}; expected {expected}")


@dataclass(frozen=True, slots=True)
class Family:
    architectures: tuple[str, ...]  # as config.json spells them
    spec: Callable[[TextConfig], DecoderSpec]
    # transformers' values for keys that checkpoints in use leave out
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _llama(config: TextConfig) -> DecoderSpec:
    heads, hidden_size = config.integer("num_attention_heads"), config.integer("hidden_size")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{config.path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    activation = config.get("hidden_act", "hidden_activation")
    activation = "silu" if activation is None else activation
    if not isinstance(activation, str):
        raise config.bad("hidden_act", activation, "a name")
    return DecoderSpec(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.integer("head_dim", hidden_size // heads),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        hidden_act=activation,
        tie_word_embeddings=config.flag("tie_word_embeddings"),
        layers=(LayerSpec(),) * config.integer("num_hidden_layers"),
        qkv_bias=config.flag("attention_bias"),
        o_bias=config.flag("attention_bias"),
        mlp_bias=config.flag("mlp_bias"),
    )


def _mistral(config: TextConfig) -> DecoderSpec:
    """A sliding window in every layer, or none. Phi-3 and Mixtral have the same."""
    base = _llama(config)
    return replace(base, layers=(LayerSpec(window=config.optional_integer("sliding_window")),) * len(base.layers))


def _by_layer_type(
    config: TextConfig, num_layers: int, slides: Callable[[int], bool], window: int | None, *, ropes: bool = False
) -> tuple[LayerSpec, ...]:
    """Layers by `layer_types`; if absent, layer i has the window if `slides(i)`. ropes: one per
    type.
    """
    types = config.get("layer_types")
    if types is None:
        types = ["sliding_attention" if slides(i) else "full_attention" for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not all(isinstance(kind, str) for kind in types):
        raise config.bad("layer_types", types, f"a list of {num_layers} names, one a layer")
    known = {"full_attention": None, "sliding_attention": window}
    unknown = set(types) - known.keys()
    if unknown:
        raise ModelError(f"{config.path} has layers of type {sorted(unknown)}; only {sorted(known)} are supported")
    return tuple(LayerSpec(window=known[kind], rope=kind if ropes else None) for kind in types)


def _qwen_window(config: TextConfig) -> int | None:
    return config.optional_integer("sliding_window") if config.flag("use_sliding_window") else None


def _qwen2(config: TextConfig) -> DecoderSpec:
    base, window, first = _llama(config), _qwen_window(config), config.number("max_window_layers", 28)
    layers = _by_layer_type(config, len(base.layers), lambda i: window is not None and i >= first, window)
    return replace(base, layers=layers, qkv_bias=True)


def _qwen3(config: TextConfig) -> DecoderSpec:
    return replace(_qwen2(config), qkv_bias=config.flag("attention_bias"), qk_norm=QKNorm.HEAD)


def _gemma2(config: TextConfig, *, period: int = 2, ropes: bool = False) -> DecoderSpec:
    """Every `period`-th layer attends to the whole context."""
    base, window = _llama(config), config.optional_integer("sliding_window")
    return replace(
        base,
        layers=_by_layer_type(config, len(base.layers), lambda i: (i + 1) % period != 0, window, ropes=ropes),
        norm_offset=1.0,
        attention_post_norm="post_attention_layernorm",
        mlp_pre_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=config.optional_number("attn_logit_softcapping"),
        final_softcap=config.optional_number("final_logit_softcapping"),
        embedding_scale=base.hidden_size**0.5,
    )


def _gemma3(config: TextConfig) -> DecoderSpec:
    """Like Gemma 2, with norms of queries and keys, and a rope for each layer type."""
    if config.flag("use_bidirectional_attention"):
        raise ModelError(f"{config.path} sets use_bidirectional_attention: an encoder, which cannot generate tokens")
    spec = _gemma2(config, period=config.integer("sliding_window_pattern", 6), ropes=True)
    return replace(spec, qk_norm=QKNorm.HEAD)


def _experts(config: TextConfig, intermediate_size: int, *, renormalize: bool) -> ExpertsSpec:
    """num_local_experts or num_experts, depending on the version of transformers."""
    key = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    num_experts, chosen = config.integer(key), config.integer("num_experts_per_tok")
    if chosen > num_experts:
        raise ModelError(f"{config.path}: num_experts_per_tok {chosen} is above {key} {num_experts}")
    return ExpertsSpec(num_experts, chosen, intermediate_size, renormalize)


def _mixtral(config: TextConfig) -> DecoderSpec:
    base = _mistral(config)
    experts = _experts(config, base.intermediate_size, renormalize=True)
    return replace(base, layers=tuple(replace(layer, experts=experts) for layer in base.layers))


def _qwen3_moe(config: TextConfig) -> DecoderSpec:
    base, width = _llama(config), config.integer("moe_intermediate_size")
    experts = _experts(config, width, renormalize=config.flag("norm_topk_prob"))
    dense = LayerSpec(window=_qwen_window(config))
    sparse, step = replace(dense, experts=experts), config.integer("decoder_sparse_step", 1)
    only_dense = config.get("mlp_only_layers") or []
    if not isinstance(only_dense, list):
        raise config.bad("mlp_only_layers", only_dense, "a list of layer numbers")
    numbers = range(len(base.layers))
    layers = tuple(sparse if i not in only_dense and (i + 1) % step == 0 else dense for i in numbers)
    return replace(base, layers=layers, qk_norm=QKNorm.HEAD)


def _olmo2(config: TextConfig) -> DecoderSpec:
    return replace(
        _llama(config),
        qk_norm=QKNorm.PROJECTION,
        attention_pre_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_pre_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
    )


_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}

FAMILIES: dict[str, Family] = {  # by the text configuration's model_type
    "llama": Family(
        ("LlamaForCausalLM",),
        _llama,
        {"intermediate_size": 11_008, "max_position_embeddings": 2048, "eos_token_id": 2},
    ),
    "mistral": Family(
        ("MistralForCausalLM",),
        _mistral,
        {
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
            "eos_token_id": 2,
        },
    ),
    "qwen2": Family(("Qwen2ForCausalLM",), _qwen2, {"intermediate_size": 22_016, "sliding_window": 4096}),
    "qwen3": Family(
        ("Qwen3ForCausalLM",), _qwen3, {"head_dim": 128, "intermediate_size": 22_016, "sliding_window": 4096}
    ),
    "gemma2": Family(
        ("Gemma2ForCausalLM",),
        _gemma2,
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3_text": Family(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        _gemma3,
        {**_GEMMA, "vocab_size": 262_208, "max_position_embeddings": 131_072},
    ),
    "phi3": Family(
        ("Phi3ForCausalLM",), _mistral, {"intermediate_size": 8192, "rms_norm_eps": 1e-5, "eos_token_id": 32_000}
    ),
    "mixtral": Family(
        ("MixtralForCausalLM",),
        _mixtral,
        {
            "num_key_value_heads": 8,
            "intermediate_size": 14_336,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 131_072,
            "eos_token_id": 2,
        },
    ),
    "qwen3_moe": Family(
        ("Qwen3MoeForCausalLM",),
        _qwen3_moe,
        {
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "sliding_window": 4096,
        },
    ),
    "olmo2": Family(
        ("Olmo2ForCausalLM",), _olmo2, {"intermediate_size": 11_008, "rms_norm_eps": 1e-5, "eos_token_id": 50_279}
    ),
}


def text_config(path: Path, config: Mapping[str, Any]) -> tuple[Family, TextConfig]:
    """The family and the language model's part of a parsed config.json, with defaults.

    path: of the file, for messages. Raises ModelError for an unknown architecture.
    """
    family = _family(path, config.get("architectures"), config.get("model_type"))
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise ModelError(f"{path}: text_config is {text!r}; expected an object")
    tied = config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings", False))
    return family, TextConfig(path, {**family.defaults, **text, "tie_word_embeddings": tied})


def decoder_spec(path: Path, config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a parsed config.json. Raises ModelError for what no family can express."""
    family, text = text_config(path, config)
    return family.spec(text)


def _family(path: Path, architectures: object, model_type: object) -> Family:
    """The family of the first architecture, or of `model_type` if there is none."""
    if architectures and not (isinstance(architectures, list) and isinstance(architectures[0], str)):
        raise ModelError(f"{path}: architectures is {architectures!r}; expected a list of names")
    if isinstance(architectures, list) and architectures:
        found = next((family for family in FAMILIES.values() if architectures[0] in family.architectures), None)
        named = f"architecture {architectures[0]!r}"
    else:
        found = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        named = f"model_type {model_type!r}"
    if found is None:
        supported = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
        raise ModelError(f"{path}: {named} is not supported; supported are {supported}")
    return found
