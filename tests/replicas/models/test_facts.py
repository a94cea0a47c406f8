"""What is known of a checkpoint before it is loaded: as AutoConfig has it, without torch, or refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from shoal.replicas.errors import ModelError
from shoal.replicas.model_spec import QKNorm
from shoal.replicas.models.checkpoint import list_tensors, read_json, read_model_facts, resolve_model_path
from shoal.replicas.models.families import FAMILIES as KNOWN_FAMILIES
from shoal.replicas.models.families import decoder_spec
from shoal.replicas.stages import stage_layers
from tests.support.checkpoints import FAMILIES


@pytest.fixture
def llama(tmp_path) -> Path:
    return FAMILIES["llama"](tmp_path / "llama")


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_autoconfig(family, tmp_path):
    folder = FAMILIES[family](tmp_path / family)
    facts, config = read_model_facts(folder), AutoConfig.from_pretrained(folder).get_text_config()
    assert any(facts.architecture in known.architectures for known in KNOWN_FAMILIES.values())
    assert facts.num_layers == config.num_hidden_layers
    assert facts.hidden_size == config.hidden_size
    assert facts.num_attention_heads == config.num_attention_heads
    assert facts.num_kv_heads == config.num_key_value_heads
    assert facts.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert facts.vocab_size == config.vocab_size
    assert facts.max_position_embeddings == config.max_position_embeddings
    assert facts.eos_token_ids == (config.eos_token_id,)
    assert facts.dtype == "float32"
    path = folder / "config.json"
    spec = decoder_spec(path, config.to_dict())
    assert decoder_spec(path, read_json(path)) == spec
    assert facts.norms_all_kv_heads == (spec.qk_norm is QKNorm.PROJECTION)
    layers = spec.layers
    widths = [layer.experts.intermediate_size if layer.experts else config.intermediate_size for layer in layers]
    assert set(facts.intermediate_sizes) == set(widths)
    for num_stages in range(1, len(layers) + 1):
        most = max(map(len, stage_layers(spec, num_stages)))
        per_layer = 2 * facts.num_kv_heads * facts.head_dim * 4
        assert facts.kv_cache_spec("float32", pp=num_stages).bytes_per_token == most * per_layer
    assert facts.num_parameters == sum(math.prod(info.shape) for info in list_tensors(folder).values())


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        # The sparse text part of the 4 B multimodal Gemma 3, as its config.json has it.
        (
            "Gemma3ForConditionalGeneration",
            {
                "model_type": "gemma3",
                "text_config": {
                    "model_type": "gemma3_text",
                    "hidden_size": 2560,
                    "intermediate_size": 10240,
                    "num_hidden_layers": 34,
                    "sliding_window": 1024,
                    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                },
            },
        ),
        # Llama 2 before num_key_value_heads and head_dim were written.
        (
            "LlamaForCausalLM",
            {
                "model_type": "llama",
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "vocab_size": 32000,
                "torch_dtype": "float16",
            },
        ),
    ],
)
def test_keys_that_are_left_out_have_transformers_defaults(architecture, config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))
    facts, whole = read_model_facts(tmp_path), AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert (facts.num_attention_heads, facts.num_kv_heads) == (whole.num_attention_heads, whole.num_key_value_heads)
    assert (facts.head_dim, facts.vocab_size) == (whole.head_dim, whole.vocab_size)
    assert facts.max_position_embeddings == whole.max_position_embeddings
    assert facts.eos_token_ids == (whole.eos_token_id,)
    assert facts.dtype == config.get("torch_dtype", "float32")


@pytest.mark.parametrize("name", KNOWN_FAMILIES)
def test_defaults_are_those_of_transformers(name):
    """A config.json that leaves out what it may is the spec of transformers' configuration class."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8, "vocab_size": 1000}
    required = sizes | ({"num_key_value_heads": 4} if name.startswith("qwen") else {})
    whole = AutoConfig.for_model(name, **required)
    sparse = {"model_type": name, **required}
    assert decoder_spec(Path(), sparse) == decoder_spec(Path(), whole.to_dict())
    for key, value in KNOWN_FAMILIES[name].defaults.items():
        if key not in required and key != "sliding_window":  # Qwen's classes drop a window that is not used
            assert getattr(whole, key) == value, key


def test_every_architecture_has_one_family():
    architectures = [name for family in KNOWN_FAMILIES.values() for name in family.architectures]
    assert len(set(architectures)) == len(architectures)


def test_generation_config_says_where_sequences_end(llama):
    edit_json(llama / "generation_config.json", eos_token_id=[7, 9, 7])
    assert read_model_facts(llama).eos_token_ids == (7, 9)


def test_facts_are_read_without_torch(llama):
    code = (
        "import sys; from pathlib import Path; from shoal.replicas.models.checkpoint import *;"
        f"print(read_model_facts(resolve_model_path({str(llama)!r})).num_layers, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_an_unknown_architecture_is_named_with_the_known_ones(llama):
    edit_json(llama / "config.json", architectures=["FalconForCausalLM"])
    with pytest.raises(ModelError, match=r"FalconForCausalLM.*LlamaForCausalLM"):
        read_model_facts(llama)


@pytest.mark.parametrize("value", [None, 0, "64", True])
def test_a_fact_that_is_no_positive_integer_is_named(value, llama):
    edit_json(llama / "config.json", hidden_size=value)
    with pytest.raises(ModelError, match=r"config.json: hidden_size is"):
        read_model_facts(llama)


@pytest.mark.parametrize(
    ("family", "changed", "message"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5 is above num_local_experts 4"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok 7 is above num_(local_)?experts 6"),
    ],
)
def test_numbers_that_contradict_each_other_are_errors(family, changed, message, tmp_path):
    """With random weights nothing else would tell before the first step."""
    folder = FAMILIES[family](tmp_path)
    edit_json(folder / "config.json", **changed)
    with pytest.raises(ModelError, match=message):
        read_model_facts(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_a_config_that_is_no_json_object_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        read_model_facts(tmp_path)


def test_model_paths(tmp_path, monkeypatch):
    assert resolve_model_path(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match="no revision 'main'"):
        resolve_model_path(str(tmp_path), "main")
    with pytest.raises(ModelError, match="there is no model folder"):
        resolve_model_path(str(tmp_path / "absent"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"shoal-tests/absent.*give a local folder"):
        resolve_model_path("shoal-tests/absent")
