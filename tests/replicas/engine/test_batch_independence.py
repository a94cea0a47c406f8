"""A request's tokens are its own: alone, in any batch, in chunks, preempted, from the cache or replayed.

The shipped model in fp32 on the CPU, with seeded sampling. Tokens are compared for equality. Log-probabilities
agree to rounding: a GEMM's row does not depend on the batch. Attention does: it sums over the longest context
of a batch, and over a chunk in another order than over one token.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shoal.quant.methods.unquantized import UnquantizedLinear
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.offline import Completion, build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams

TINY = Path(__file__).parents[3] / "deploy" / "models" / "tiny"
PROMPT_LENS = (1, 5, 17, 33, 64, 65, 100)
TOLERANCE = 1e-4


def request(index: int) -> Request:
    draw = random.Random(index)
    prompt = tuple(draw.randrange(10, 3000) for _ in range(PROMPT_LENS[index]))
    options = [{}, {"top_p": 0.9}, {"top_k": 20}, {"repetition_penalty": 1.2}, {"min_p": 0.02}, {"min_tokens": 9}, {}]
    sampling = SamplingParams(
        max_tokens=14, seed=index, logprobs=1, prompt_logprobs=1, ignore_eos=index % 2 == 0, **options[index]
    )
    return Request(str(index), prompt, sampling)


REQUESTS = [request(i) for i in range(len(PROMPT_LENS))]


def engine(num_blocks: int = 256, budget: int = 256, *, caching: bool = False) -> Engine:
    return build_engine(
        EngineConfig(
            ModelConfig(str(TINY), dtype="float32", max_model_len=256),
            CacheConfig(num_blocks=num_blocks, block_size=16, enable_prefix_caching=caching),
            SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget),
            device="cpu",
            num_threads=1,
        )
    )


def run(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    return [completion for entries in generate(engine, requests).values() for completion in entries]


@pytest.fixture(scope="module")
def alone() -> list[Completion]:
    one = engine()
    return [completion for each in REQUESTS for completion in run(one, [each])]


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        for scores, others in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert scores is not None
            assert others is not None
            assert len(scores) == len(others)
            values = [[entry.logprob for entry in entries if entry is not None] for entries in (scores, others)]
            np.testing.assert_allclose(*values, atol=TOLERANCE)


def test_twice_alone_is_equal_to_the_last_bit(alone: list[Completion]) -> None:
    one = engine()
    assert [completion for each in REQUESTS for completion in run(one, [each])] == alone


@pytest.mark.parametrize("seed", range(2))
def test_any_batch(alone: list[Completion], seed: int) -> None:
    order = random.Random(seed).sample(range(len(REQUESTS)), len(REQUESTS))
    got = run(engine(), [REQUESTS[i] for i in order])
    assert_same(got, [alone[i] for i in order])


@pytest.mark.parametrize("budget", [8, 40])
def test_in_chunks_of_which_the_last_may_be_one_token(alone: list[Completion], budget: int) -> None:
    assert_same(run(engine(budget=budget), REQUESTS), alone)
    one = engine(budget=budget)
    assert_same([completion for each in REQUESTS for completion in run(one, [each])], alone)


def test_preempted(alone: list[Completion]) -> None:
    small = engine(num_blocks=24)
    assert_same(run(small, REQUESTS), alone)
    assert small.load().num_preemptions > 0


def test_from_the_cache(alone: list[Completion]) -> None:
    warm = engine(caching=True)
    run(warm, REQUESTS)
    unscored = [replace(each, sampling=replace(each.sampling, prompt_logprobs=None)) for each in REQUESTS]
    got = run(warm, unscored)
    assert [completion.num_cached_tokens for completion in got] == [(n - 1) // 16 * 16 for n in PROMPT_LENS]
    assert [completion.token_ids for completion in got] == [completion.token_ids for completion in alone]


def test_replayed_from_any_position(alone: list[Completion]) -> None:
    other = engine()
    lives, expected = [], []
    for each, whole in zip(REQUESTS, alone, strict=True):
        for cut in range(1, len(whole.token_ids), 6):
            name = f"{each.request_id} from {cut}"
            lives.append(replace(each, request_id=name, emitted_token_ids=tuple(whole.token_ids[:cut])))
            expected.append(whole.token_ids[cut:])
    assert [completion.token_ids for completion in run(other, lives)] == expected


def test_forks_are_what_single_samples_would_be(alone: list[Completion]) -> None:
    one = engine()
    for each in REQUESTS[2:5]:
        forks = run(one, [replace(each, request_id="forks", num_samples=3)])
        singles = [replace(each, request_id=str(sample), first_sample=sample) for sample in range(3)]
        assert [fork.token_ids for fork in forks] == [run(one, [single])[0].token_ids for single in singles]


def test_a_row_of_a_product_has_the_same_bits_in_any_batch() -> None:
    method = UnquantizedLinear()
    generator = torch.Generator().manual_seed(0)
    for num_in, num_out in ((256, 768), (704, 256), (256, 4096)):
        weights = method.prepare({"weight": torch.randn(num_out, num_in, generator=generator)})
        if "packed" not in weights:
            pytest.skip("this build of torch has no oneDNN")
        x = torch.randn(70, num_in, generator=generator)
        rows = torch.cat([method.apply(weights, row[None], None) for row in x])
        for num_tokens in (2, 3, 8, 16, 33, 70):
            assert torch.equal(method.apply(weights, x[:num_tokens], None), rows[:num_tokens])
