"""The shipped model is what its card says: format, tokenizer, chat template, perplexity."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "deploy" / "models" / "tiny"
STDLIB = Path(sysconfig.get_path("stdlib"))
RECORD = json.loads((FOLDER / "heldout.json").read_text())
# Held-out modules that every supported Python has, short enough for one window each.
SAMPLE = ["bisect.py", "html/__init__.py", "secrets.py"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_weights_are_small_bfloat16_safetensors_alone():
    assert (FOLDER / "model.safetensors").stat().st_size < 20_000_000
    assert not [file for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for file in FOLDER.glob(pattern)]
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118 - tied


def test_the_model_has_the_size_its_card_states(model):
    assert model.num_parameters() == 7_344_384
    assert f"{model.num_parameters():,}" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", [path for path in RECORD["heldout_modules"] if (STDLIB / path).is_file()])
def test_a_heldout_source_survives_the_tokenizer(tokenizer, path):
    text = (STDLIB / path).read_text(encoding="utf-8")
    ids = tokenizer.encode(text, verbose=False)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\t\tx\r\n", "a  b   c    d", "naïve Größe 你好 🦈👩‍👩‍👧", "\x00\x7f\ufeff", " .  ,  '  n't", "é"]
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_suits_code(tokenizer):
    assert len(tokenizer) == 4096
    shallow, deep = ("if x:\n" + " " * depth + "return x" for depth in (4, 16))
    assert len(tokenizer.encode(shallow)) == len(tokenizer.encode(deep))  # an indent is one token


def test_the_chat_template_renders_special_tokens(tokenizer):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(rendered, add_special_tokens=False)
    assert [token for token in ids if token < 5] == [0, 3, 4, 3, 4, 3]


def test_a_chat_answer_is_code_and_ends_by_itself(model, tokenizer):
    messages = [{"role": "user", "content": "def fibonacci(n):"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=160, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert output[-1].item() == tokenizer.convert_tokens_to_ids("<|im_end|>")
    compile(tokenizer.decode(output, skip_special_tokens=True), "answer", "exec")


@torch.inference_mode()
def test_heldout_perplexity_is_near_the_recorded_one(model, tokenizer):
    assert set(SAMPLE) <= set(RECORD["heldout_modules"])
    loss, num_tokens = 0.0, 0
    for path in SAMPLE:
        ids = tokenizer((STDLIB / path).read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[
            :, :1024
        ]
        loss += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        num_tokens += ids.shape[1] - 1
    perplexity = torch.tensor(loss / num_tokens).exp().item()
    assert RECORD["perplexity_per_token"] / 2 < perplexity < RECORD["perplexity_per_token"] * 2


def test_the_card_states_the_recorded_perplexity():
    card = (FOLDER / "README.md").read_text()
    assert f"| {RECORD['perplexity_per_token']:.2f} | {RECORD['perplexity_per_byte']:.3f} |" in card
