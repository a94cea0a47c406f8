"""Cos/sin caches of rotary embeddings. transformers' own functions give scaled inverse frequencies."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...kernels.attention.rope import RopeRows, rope_rows
from ..errors import ModelError
from .weights import Layer


class RotaryEmbedding(Layer):
    """The cache [max_model_len, R] of one rope dictionary.

    `layer_type` selects the dictionary if layer types have their own (Gemma 3). longrope has two
    sets of factors, for short and long contexts. max_model_len selects one for good, because cached
    keys are rotated. (transformers switches in mid-sequence and recomputes the prompt.)
    """

    def __init__(
        self, config: Any, head_dim: int, max_model_len: int, device: torch.device, layer_type: str | None = None
    ) -> None:
        super().__init__()
        parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        rope_type = parameters["rope_type"]
        if rope_type == "default":
            num_rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
            steps = torch.arange(0, num_rotated, 2, dtype=torch.float32) / num_rotated
            frequencies, attention_factor = 1.0 / (parameters["rope_theta"] ** steps), 1.0
        elif rope_type in ROPE_INIT_FUNCTIONS:
            frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](
                config, torch.device("cpu"), seq_len=max_model_len, layer_type=layer_type
            )
        else:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ModelError(f"config.json asks for rope type {rope_type!r}, which is not supported; known: {known}")
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * frequencies.float()
        cache = torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_factor
        self.register_buffer("cache", cache.to(device), persistent=False)

    def rows(self, positions: torch.Tensor, dtype: torch.dtype) -> RopeRows:
        """The factors of positions int64 [T]."""
        return rope_rows(self.get_buffer("cache"), positions, dtype)
