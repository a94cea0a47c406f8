"""Every way of choosing tokens, by a model split over processes: what one process gives, log-probabilities too."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from shoal.replicas.offline import Completion, build_engine, generate
from shoal.replicas.protocol import Logprob, Request, SamplingParams
from tests.support.checkpoints import FAMILIES
from tests.support.golden import PROMPTS, engine_config

ENDLESS = {"max_tokens": 16, "ignore_eos": True}
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0, logprobs=3, **ENDLESS),
    "temperature": SamplingParams(seed=5, **ENDLESS),
    "top-k": SamplingParams(top_k=6, seed=6, **ENDLESS),
    "top-p": SamplingParams(top_p=0.8, temperature=0.7, seed=2**63, logprobs=0, **ENDLESS),
    "min-p": SamplingParams(min_p=0.1, seed=7, **ENDLESS),
    "penalties": SamplingParams(seed=8, repetition_penalty=1.4, presence_penalty=0.6, frequency_penalty=0.3, **ENDLESS),
    "bias": SamplingParams(temperature=0.0, logit_bias=((90, 3.0), (3, -9.0)), bad_words=((7,), (90, 90)), **ENDLESS),
    "prompt": SamplingParams(seed=9, prompt_logprobs=4, logprobs=2, **ENDLESS),
}


def complete(folder: Path, tp: int, pp: int) -> dict[str, Completion]:
    """All of SAMPLING at once, so that plain and filtered rows meet in steps, then the plain ones by themselves."""
    engine = build_engine(engine_config(folder, tp, pp))
    try:
        requests = [
            Request(name, PROMPTS[i % len(PROMPTS)], sampling) for i, (name, sampling) in enumerate(SAMPLING.items())
        ]
        found = {name: completions[0] for name, completions in generate(engine, requests).items()}
        alone = generate(engine, requests[:2])
        assert all(alone[name][0].token_ids == found[name].token_ids for name in alone)
        return found
    finally:
        engine.shutdown()


def assert_same_logprobs(found: Logprob | None, expected: Logprob | None) -> None:
    if found is None or expected is None:
        assert found is expected
        return
    assert (found.token_id, found.rank) == (expected.token_id, expected.rank)
    assert math.isclose(found.logprob, expected.logprob, abs_tol=1e-4)
    for (token, logprob), (other, likewise) in zip(found.top, expected.top, strict=True):
        assert token == other
        assert math.isclose(logprob, likewise, abs_tol=1e-4)


def check_split(folder: Path, tp: int, pp: int) -> None:
    expected, found = complete(folder, 1, 1), complete(folder, tp, pp)
    assert {name: each.token_ids for name, each in found.items()} == {
        name: each.token_ids for name, each in expected.items()
    }
    for name in SAMPLING:
        for mine, others in zip(found[name].logprobs, expected[name].logprobs, strict=True):
            assert_same_logprobs(mine, others)
    of_prompt, expected_of_prompt = found["prompt"].prompt_logprobs, expected["prompt"].prompt_logprobs
    assert of_prompt is not None
    assert expected_of_prompt is not None
    for mine, others in zip(of_prompt, expected_of_prompt, strict=True):
        assert_same_logprobs(mine, others)


def test_two_ranks(tmp_path):
    check_split(FAMILIES["llama"](tmp_path), 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tp", "pp"), [("gemma2", 2, 1), ("qwen3", 4, 1), ("llama", 2, 2), ("mixtral", 1, 2)]
)
def test_ranks_of_other_families_and_shapes(family, tp, pp, tmp_path):
    """Gemma 2 caps its logits, on slices of them."""
    check_split(FAMILIES[family](tmp_path), tp, pp)
