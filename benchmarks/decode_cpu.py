"""Decode on the CPU: the engine against transformers `generate`, in turn in one run.

Both get the same prompts, run greedily in fp32 on as many threads, ignore end-of-sequence, and make as many tokens.
Time is from the first new token to the last, without prefill; tokens/s is the whole batch's. Tokens are compared too.

    python -m benchmarks.decode_cpu [--model deploy/models/tiny] [--batch 1 8] [--tokens 128] [--rounds 5]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmarks.report import ROOT, Report
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.offline import build_engine
from shoal.replicas.protocol import Request, SamplingParams

Prompt = tuple[int, ...]
Run = tuple[float, list[list[int]]]  # tokens/s of the batch, tokens of each sequence


def make_prompts(batch: int, prompt_len: int, vocab_size: int) -> list[Prompt]:
    draw = random.Random(0)
    return [tuple(draw.randrange(8, vocab_size) for _ in range(prompt_len)) for _ in range(batch)]


def run_engine(engine: Engine, prompts: Sequence[Prompt], num_tokens: int, tag: str) -> Run:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(Request(f"{tag}-{index}", prompt, sampling))
    outputs: list[list[int]] = [[] for _ in prompts]
    started = None
    num_before = 0
    while engine.has_work:
        for delta in engine.step():
            outputs[int(delta.request_id.rpartition("-")[2])].extend(delta.token_ids)
        if started is None and all(outputs):
            started, num_before = time.perf_counter(), sum(map(len, outputs))
    assert started is not None
    return (sum(map(len, outputs)) - num_before) / (time.perf_counter() - started), outputs


class FirstTokenClock(LogitsProcessor):
    """Records the start of the second step, when the first new token exists."""

    def __init__(self) -> None:
        self.calls = 0
        self.started = 0.0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.calls += 1
        if self.calls == 1:
            self.started = time.perf_counter()
        return scores


def run_transformers(model: Any, prompts: Sequence[Prompt], num_tokens: int) -> Run:
    clock = FirstTokenClock()
    input_ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
        )
    elapsed = time.perf_counter() - clock.started
    tokens = output[:, input_ids.shape[1] :].tolist()
    return (num_tokens - 1) * len(prompts) / elapsed, tokens


def compare(model: Any, engine: Engine, prompts: list[Prompt], num_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` alternating rounds of both, after one warm-up round."""
    ours: list[float] = []
    theirs: list[float] = []
    num_equal = 0
    for round_number in range(rounds + 1):
        speed, tokens = run_engine(engine, prompts, num_tokens, f"{len(prompts)}.{round_number}")
        reference_speed, reference_tokens = run_transformers(model, prompts, num_tokens)
        num_equal = sum(a == b for a, b in zip(tokens, reference_tokens, strict=True))
        if round_number:
            ours.append(speed)
            theirs.append(reference_speed)
    return {
        "batch": len(prompts),
        "shoal tok/s": median(ours),
        "transformers tok/s": median(theirs),
        "ratio": median([a / b for a, b in zip(ours, theirs, strict=True)]),
        "equal sequences": f"{num_equal}/{len(prompts)}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "deploy" / "models" / "tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # ignore end-of-sequence
    # All rounds share prompts that both sides must prefill: no prefix cache.
    config = EngineConfig(
        ModelConfig(str(arguments.model), dtype="float32"),
        CacheConfig(enable_prefix_caching=False),
        device="cpu",
        num_threads=arguments.threads,
    )
    engine = build_engine(config)
    report = Report("decode_cpu", settings=vars(arguments) | {"model": str(arguments.model)})
    try:
        for batch in arguments.batch:
            prompts = make_prompts(batch, arguments.prompt_len, model.config.vocab_size)
            report.add(**compare(model, engine, prompts, arguments.tokens, arguments.rounds))
    finally:
        engine.shutdown()
    report.show()
    report.write()


if __name__ == "__main__":
    main()
