"""Every family on a CUDA device: logits as near to fp32 as a dtype allows, and the shipped model's very tokens.

How far logits in bf16 or fp16 may stray is not for us to guess: transformers' own eager model, in the same dtype on the
same device, has the roundings of that dtype and no trick to avoid them. Ours must not stray much further.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import shoal
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from shoal.replicas.text.tokenizer import Tokenizer
from tests.support import paged
from tests.support.checkpoints import FAMILIES, VOCAB_SIZE

TINY = Path(shoal.__file__).parent / "deploy" / "models" / "tiny"
LENGTHS = (61, 43, 58, 22)  # of the prompts
CHUNK = 19

pytestmark = pytest.mark.gpu


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(2, VOCAB_SIZE - 8, (n,), generator=generator).tolist() for n in LENGTHS]


def our_logits(folder: Path, device: str, dtype: torch.dtype) -> torch.Tensor:
    """fp32 [all prompts' tokens, vocab] on the CPU; of each prompt a chunk, the rest, and the last token alone."""
    model = paged.PagedModel(folder, len(LENGTHS), device=torch.device(device), dtype=dtype)
    rows: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    parts = [(prompt[:CHUNK], prompt[CHUNK:-1], prompt[-1:]) for prompt in prompts()]
    for step in zip(*parts, strict=True):
        logits = model.logits(list(enumerate(step))).float().cpu()
        for row, part in zip(rows, logits.split([len(tokens) for tokens in step]), strict=True):
            row.append(part)
    return torch.cat([part for row in rows for part in row])


@torch.inference_mode()
def transformers_logits(folder: Path, device: str, dtype: torch.dtype) -> torch.Tensor:
    """As `our_logits`, each prompt as a whole."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").to(device).eval()
    each = [model(torch.tensor([prompt], device=device), use_cache=False).logits[0] for prompt in prompts()]
    return torch.cat(each).float().cpu()


def typical_error(logits: torch.Tensor, want: torch.Tensor) -> float:
    """The median over tokens of the root mean square error of a token's logits.

    The median, because a rounding that makes a router choose another expert moves that token's logits by far more than
    the rounding, in either implementation.
    """
    return (logits - want).square().mean(-1).sqrt().median().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stray_from_fp32_no_further_than_roundings_explain(family, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "BLOCK_SIZE", 16)
    folder = FAMILIES[family](tmp_path)
    want = our_logits(folder, "cpu", torch.float32)
    ours = typical_error(our_logits(folder, "cuda", dtype), want)
    theirs = typical_error(transformers_logits(folder, "cuda", dtype), want)
    assert 0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_fp32_are_those_of_the_cpu(family, tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "BLOCK_SIZE", 16)
    folder = FAMILIES[family](tmp_path)
    want = our_logits(folder, "cpu", torch.float32)
    torch.testing.assert_close(our_logits(folder, "cuda", torch.float32), want, rtol=1e-4, atol=1e-4)


def greedy_tokens(device: str) -> list[list[int]]:
    """200 tokens after each of 20 beginnings of Python functions, in fp32."""
    tokenizer = Tokenizer.from_folder(TINY)
    nouns = ("line", "path", "item", "node", "key")
    names = [f"{verb}_{noun}" for verb in ("read", "parse", "close", "find") for noun in nouns]
    requests = [
        Request(
            name,
            tuple(tokenizer.encode(f"def {name}(")),
            SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True),
        )
        for name in names
    ]
    config = EngineConfig(
        ModelConfig(str(TINY), dtype="float32", max_model_len=512),
        CacheConfig(block_size=16, num_blocks=1024),
        SchedulerConfig(max_num_seqs=20),
        device=device,
        num_threads=1,  # more would spin for cores that tests beside this one use, and go on after it
    )
    engine = build_engine(config)
    try:
        completions = generate(engine, requests)
    finally:
        engine.shutdown()
    return [completions[name][0].token_ids for name in names]


def test_greedy_tokens_of_the_shipped_model_are_those_of_the_cpu():
    got, want = greedy_tokens("cuda"), greedy_tokens("cpu")
    assert [len(tokens) for tokens in want] == [200] * 20
    assert got == want
