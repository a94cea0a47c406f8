"""Lower bounds of a dense decoder's times on a device.

decode   t = max(W_bytes/BW, 2 B W/F) + max(B ctx KV/BW, 4 B ctx L n d/F)

prefill  t = 2 W_lin S/F + 4 L n d (S ctx0 + S^2/2)/F

W: weights that every token reads (W_lin: without lm_head, which only last positions read). KV:
bytes of keys and values a token. L layers, n query heads of d, B sequences, ctx context, S new
tokens after ctx0, BW bytes/s, F flop/s. Both rates are measured (`rates.py`), not taken from a data
sheet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...replicas.errors import ConfigError
from ...replicas.kv_cache_spec import DTYPE_BYTES
from ...replicas.models.checkpoint import read_json, read_model_facts


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates of a device."""

    bytes_per_s: float  # of a large copy, read and written bytes
    flops: float  # of a large GEMM, 2 M N K


@dataclass(frozen=True, slots=True)
class Dense:
    """Sizes of a dense decoder, per rank of `num_ranks`."""

    linear_weights: int  # in all layers
    head_weights: int
    weight_bytes: int  # of one weight
    kv_bytes: int  # of one token
    attention_width: int  # layers * query heads * head_dim

    @classmethod
    def of(cls, folder: Path, dtype: str = "bfloat16", num_ranks: int = 1) -> Dense:
        """Sizes of a model folder. Raises ConfigError for MoE, whose steps read only some weights."""
        facts, config = read_model_facts(folder), read_json(folder / "config.json")
        text = config.get("text_config") or config
        if any("experts" in key for key in text):
            raise ConfigError(f"{folder} is a mixture of experts; limits are known for dense decoders only")
        hidden, heads = facts.hidden_size, facts.num_attention_heads * facts.head_dim
        attention = hidden * (2 * heads + 2 * facts.num_kv_heads * facts.head_dim)
        mlp = 3 * hidden * int(text["intermediate_size"])
        return cls(
            linear_weights=facts.num_layers * (attention + mlp) // num_ranks,
            head_weights=facts.vocab_size * hidden // num_ranks,
            weight_bytes=DTYPE_BYTES[dtype],
            kv_bytes=facts.kv_cache_spec(dtype).bytes_per_token // num_ranks,
            attention_width=facts.num_layers * heads // num_ranks,
        )

    def decode_s(self, batch: int, context: float, rates: Rates) -> float:
        """Seconds of one step that decodes `batch` sequences of `context` tokens each."""
        weights = self.linear_weights + self.head_weights
        linear = max(weights * self.weight_bytes / rates.bytes_per_s, 2 * batch * weights / rates.flops)
        tokens = batch * context
        attention = max(tokens * self.kv_bytes / rates.bytes_per_s, 4 * tokens * self.attention_width / rates.flops)
        return linear + attention

    def prefill_s(self, num_tokens: int, rates: Rates, context: int = 0) -> float:
        """Seconds to prefill `num_tokens` of one prompt after `context` cached tokens."""
        pairs = num_tokens * context + num_tokens**2 / 2
        return (2 * self.linear_weights * num_tokens + 4 * self.attention_width * pairs) / rates.flops
