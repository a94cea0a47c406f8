"""Model folders of well-known shapes, without weights, for measurements.

A folder holds a config.json for `load_format: dummy`, and the shipped tokenizer, filled up to the
vocabulary size. Random weights sample all tokens evenly, and a token without text would send no
event.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...replicas.models.checkpoint import resolve_model_path

TINY_MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny"

_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32_768,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "vocab_size": 128_256,
}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": _COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "70b": _COMMON
    | {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    # On two GPUs each rank does the work of one of four of 70b: half its heads, MLP and vocabulary.
    "70b-half": _COMMON
    | {
        "hidden_size": 8192,
        "intermediate_size": 14_336,
        "num_hidden_layers": 80,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 64_128,
    },
}


def write_shape(name: str, folder: Path) -> Path:
    """Write the shape `name` into `folder`; returns it."""
    config = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = json.loads((TINY_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    _fill_vocabulary(tokenizer["model"]["vocab"], config["vocab_size"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((TINY_MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_max_length"] = config["max_position_embeddings"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _fill_vocabulary(vocabulary: dict[str, int], size: int) -> None:
    """Give every id up to `size` a spelling: a space (as byte-level vocabularies write it) and its number."""
    for token_id in range(len(vocabulary), size):
        vocabulary[f"Ġ#{token_id:x}"] = token_id


@contextmanager
def open_model(model: str) -> Iterator[tuple[Path, bool]]:
    """(folder, whether its weights are random) of a shape's name, `tiny`, a folder, or a Hugging Face id."""
    if model not in SHAPES:
        yield TINY_MODEL if model == "tiny" else resolve_model_path(model), False
        return
    with tempfile.TemporaryDirectory(prefix=f"shoal-{model}-") as folder:
        yield write_shape(model, Path(folder)), True
