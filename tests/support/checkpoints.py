"""Tiny random checkpoints of every supported family, made by transformers itself.

`FAMILIES[name](folder)` writes one and returns the folder. Two or three layers, hidden size 64, and every setting that
sets the family apart turned on at a size that short tests reach: windows of 7-12 tokens, soft caps that bend, rope
scalings. The end-of-sequence id is a token that no prompt contains; random models seldom produce it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB_SIZE = 151  # odd on purpose
EOS_TOKEN_ID = 150

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": 0,
}


def save_random(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Gives every parameter a random value, norms and biases too, and saves the model in fp32."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        else:
            # Large enough for logits to differ clearly, so that equal greedy tokens mean equal mathematics.
            spread = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.data = spread * torch.randn(parameter.shape, generator=generator)
    model.eval().save_pretrained(folder, **options)
    return folder


def _save(config: PreTrainedConfig, folder: Path) -> Path:
    return save_random(AutoModelForCausalLM.from_config(config, dtype=torch.float32), folder)


def llama(folder: Path) -> Path:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return _save(LlamaConfig(**_COMMON, rope_parameters=scaling), folder)


def llama_biased_tied(folder: Path) -> Path:
    """Biases in attention and MLP, tied embeddings, one kv head per query head, linear rope scaling."""
    settings = {**_COMMON, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}
    rope = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    return _save(LlamaConfig(**settings, tie_word_embeddings=True, rope_parameters=rope), folder)


def mistral(folder: Path) -> Path:
    return _save(MistralConfig(**_COMMON, sliding_window=9), folder)


def qwen2(folder: Path) -> Path:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return _save(Qwen2Config(**_COMMON, tie_word_embeddings=True, **windows), folder)


def qwen3(folder: Path) -> Path:
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
    return _save(Qwen3Config(**{**_COMMON, "head_dim": 24}, rope_parameters=yarn), folder)


def gemma2(folder: Path) -> Path:
    caps = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    config = Gemma2Config(**_COMMON, sliding_window=7, query_pre_attn_scalar=24, **caps)
    config._attn_implementation = "eager"  # the only one that applies the soft cap
    return _save(config, folder)


def _gemma3_text_config() -> Gemma3TextConfig:
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1_000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 8.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(
        **_COMMON, sliding_window=7, query_pre_attn_scalar=24, layer_types=kinds, rope_parameters=ropes
    )


def gemma3(folder: Path) -> Path:
    return _save(_gemma3_text_config(), folder)


def gemma3_multimodal(folder: Path) -> Path:
    """The text part of a vision-language checkpoint."""
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=_gemma3_text_config().to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB_SIZE - 2,
        boi_token_index=VOCAB_SIZE - 3,
        eoi_token_index=VOCAB_SIZE - 4,
    )
    return save_random(Gemma3ForConditionalGeneration(config), folder)


def phi3(folder: Path) -> Path:
    """Fused projections and longrope. Its original length is 2, so that every longer prompt uses the long
    factors in both: transformers decides by the length so far, Shoal by max_model_len."""
    settings = {key: value for key, value in _COMMON.items() if key != "head_dim"}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.0],
        "original_max_position_embeddings": 2,
        "partial_rotary_factor": 0.75,
    }
    return _save(
        Phi3Config(**settings, sliding_window=12, original_max_position_embeddings=2, rope_parameters=rope), folder
    )


def mixtral(folder: Path) -> Path:
    return _save(MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2), folder)


def qwen3_moe(folder: Path) -> Path:
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]}
    return _save(Qwen3MoeConfig(**_COMMON, norm_topk_prob=True, **experts), folder)


def olmo2(folder: Path) -> Path:
    settings = {key: value for key, value in _COMMON.items() if key != "head_dim"}
    return _save(Olmo2Config(**settings), folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    maker.__name__: maker
    for maker in (
        llama,
        llama_biased_tied,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        gemma3_multimodal,
        phi3,
        mixtral,
        qwen3_moe,
        olmo2,
    )
}
