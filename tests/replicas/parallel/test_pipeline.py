"""A model whose layers are split over pipeline stages gives the tokens of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.replicas.engine.engine import Engine
from shoal.replicas.offline import Completion, build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.checkpoints import FAMILIES
from tests.support.golden import (
    PROMPTS,
    check_greedy,
    check_straits,
    engine_config,
    greedy_of_one_process,
    split_engine,
)

ASKED = ("llama", "qwen3", "gemma3", "mixtral")
WISHES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0.9, "top_k": 20, "seed": 3},
    {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "seed": 5},
    {"temperature": 1.1, "top_p": 0.9, "logit_bias": ((7, 2.0),), "min_tokens": 3, "logprobs": 0, "seed": 9},
)


def drawn(engine: Engine) -> list[Completion]:
    """One request of each kind of sampling option, all at once; those with random sampling have two samples."""
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=14, ignore_eos=True, **wishes), num_samples=1 + (i % 2))
        for i, (prompt, wishes) in enumerate(zip(PROMPTS, WISHES, strict=True))
    ]
    return [completion for each in generate(engine, requests).values() for completion in each]


def assert_same(got: list[Completion], want: list[Completion]) -> None:
    """Tokens are equal, and log-probabilities as close as another order of summation allows."""
    assert [completion.token_ids for completion in got] == [completion.token_ids for completion in want]
    for one, other in zip(got, want, strict=True):
        for mine, theirs in zip(_logprobs(one), _logprobs(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)


def _logprobs(completion: Completion) -> list[list[float]]:
    entries = [*(completion.prompt_logprobs or ()), *completion.logprobs]
    return [[entry.logprob, *(logprob for _, logprob in entry.top)] for entry in entries if entry is not None]


def check_split(folder: Path, tp: int, pp: int) -> None:
    """Chunks, preemptions, forks, cached prefixes and sampling options change no token of a model over tp
    x pp ranks.
    """
    expected, alone = greedy_of_one_process(folder), build_engine(engine_config(folder))
    try:
        want = drawn(alone)
    finally:
        alone.shutdown()
    engine = split_engine(folder, tp, pp)
    try:
        check_greedy(engine, expected)
        assert_same(drawn(engine), want)
        check_straits(engine)
    finally:
        engine.shutdown()


def test_two_stages(tmp_path):
    check_split(FAMILIES["llama"](tmp_path), tp=1, pp=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
def test_two_stages_of_every_family(family, tmp_path):
    check_split(FAMILIES[family](tmp_path / family), tp=1, pp=2)


@pytest.mark.slow
def test_three_stages_of_which_one_receives_and_sends(tmp_path):
    check_split(FAMILIES["llama"](tmp_path), tp=1, pp=3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ASKED)
def test_two_stages_of_two_ranks(family, tmp_path):
    check_split(FAMILIES[family](tmp_path / family), tp=2, pp=2)
