"""With `batch_invariant` a request has the same tokens and log-probabilities, to the last bit, in any batch.

Random batches: which requests, when each arrives, how large a step is, how many blocks there are (few: preemption),
whether prefixes are kept. Each request was run alone before, in one chunk where its prompt allows it.

On a CUDA device in bf16, for every kind of layer. On the CPU in fp32, for all but experts: there torch chooses how it
sums by how many tokens an expert has, so that tokens are equal and log-probabilities agree to rounding.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.executors.local_executor import LocalExecutor
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.offline import Completion
from shoal.replicas.plan import StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.checkpoints import FAMILIES

TINY = Path(shoal.__file__).parent / "deploy" / "models" / "tiny"
BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN, MAX_SEQS = 16, 256, 192, 8
NUM_REQUESTS = 48  # from which the batches are drawn


@dataclass
class FewerBlocks:
    """An executor that engines of different settings share, each with the given number of its blocks."""

    executor: LocalExecutor
    num_blocks: int

    def submit(self, plan: StepPlan) -> None:
        self.executor.submit(plan)

    def result(self) -> StepResult:
        return self.executor.result()

    def shutdown(self) -> None:
        """The executor is the fixture's."""


class Served:
    """A loaded model; engines on it are cheap."""

    def __init__(self, folder: Path, device: str) -> None:
        self.facts = read_model_facts(folder)
        dtype = "bfloat16" if device == "cuda" else "float32"
        self.config = EngineConfig(
            ModelConfig(str(folder), dtype=dtype, max_model_len=MAX_MODEL_LEN),
            CacheConfig(BLOCK_SIZE, NUM_BLOCKS),
            SchedulerConfig(MAX_SEQS, max_num_batched_tokens=512),
            device=device,
            num_threads=1,
            batch_invariant=True,
        ).resolve(self.facts, device)
        self.executor = LocalExecutor(self.config)
        self.requests = [_request(i, self.facts.vocab_size) for i in range(NUM_REQUESTS)]
        self._alone: dict[str, Completion] = {}

    def engine(self, num_blocks: int = NUM_BLOCKS, budget: int = 512, *, caching: bool = False) -> Engine:
        config = replace(
            self.config,
            cache=replace(self.config.cache, enable_prefix_caching=caching),
            scheduler=replace(self.config.scheduler, max_num_batched_tokens=budget),
        )
        return Engine(config, self.facts, FewerBlocks(self.executor, num_blocks))

    def alone(self, request: Request) -> Completion:
        if request.request_id not in self._alone:
            [self._alone[request.request_id]] = run(self.engine(), [(0, request)])
        return self._alone[request.request_id]


def _request(index: int, vocab_size: int) -> Request:
    """Half of the prompts begin alike, so that prefixes are found."""
    draw = random.Random(index)
    prompt = [random.Random(i).randrange(5, vocab_size - 8) for i in range(50)] if index % 2 else []
    prompt += [draw.randrange(5, vocab_size - 8) for _ in range(draw.choice((1, 2, 15, 16, 17, 40, 64, 100)))]
    wishes = draw.choice(({}, {"top_p": 0.9}, {"top_k": 9}, {"min_p": 0.05}, {"repetition_penalty": 1.3}))
    scored = {"prompt_logprobs": 1} if index % 5 == 0 else {}
    sampling = SamplingParams(
        max_tokens=draw.randint(1, 40), temperature=draw.choice((0.0, 0.7, 1.0)), seed=index, logprobs=2,
        ignore_eos=draw.random() < 0.5, **wishes, **scored,
    )  # fmt: skip
    return Request(str(index), tuple(prompt), sampling)


def run(engine: Engine, arrivals: list[tuple[int, Request]]) -> list[Completion]:
    """Each request joins at its step."""
    found = {request.request_id: Completion(request.request_id, 0) for _, request in arrivals}
    waiting, step = sorted(arrivals, key=lambda arrival: arrival[0]), 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            engine.add_request(waiting.pop(0)[1])
        for delta in engine.step() if engine.has_work else ():
            found[delta.request_id].append(delta)
        step += 1
    assert engine.failure is None
    return [found[request.request_id] for _, request in arrivals]


def run_batch(served: Served, seed: int) -> tuple[list[Completion], list[Completion], int]:
    """(in a random batch, alone, preemptions) of the same requests."""
    draw = random.Random(seed)
    requests = draw.sample(served.requests, draw.randint(2, 2 * MAX_SEQS))
    engine = served.engine(
        num_blocks=draw.choice((NUM_BLOCKS, 20, 13)),
        budget=draw.choice((MAX_SEQS, 17, 64, 130, 512)),
        caching=draw.random() < 0.5,
    )
    together = run(engine, [(draw.randint(0, 30), request) for request in requests])
    return together, [served.alone(request) for request in requests], engine.load().num_preemptions


def scores(completion: Completion) -> list[object]:
    """All log-probabilities that a sequence received."""
    return [*completion.logprobs, *(completion.prompt_logprobs or ())]


def assert_same_bits(served: Served, seeds: range) -> None:
    preemptions = hits = 0
    for seed in seeds:
        together, alone, num_preemptions = run_batch(served, seed)
        for one, other in zip(together, alone, strict=True):
            assert one.token_ids == other.token_ids, f"batch {seed}, request {one.request_id}"
            assert scores(one) == scores(other), f"batch {seed}, request {one.request_id}"
            assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
            hits += one.num_cached_tokens
        preemptions += num_preemptions
    assert preemptions
    assert hits


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_batch() -> None:
    assert_same_bits(Served(TINY, "cuda"), range(200))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3", "olmo2", "mixtral", "qwen3_moe"])
def test_bits_of_other_families(family: str, tmp_path: Path) -> None:
    """Norms of queries and keys, windows, soft caps, experts."""
    assert_same_bits(Served(FAMILIES[family](tmp_path), "cuda"), range(20))


@pytest.mark.parametrize("family", [None, "qwen3", "gemma2"])
def test_bits_do_not_depend_on_the_batch_on_the_cpu(family: str | None, tmp_path: Path) -> None:
    """Three batches: one preempts, two find prefixes."""
    assert_same_bits(Served(TINY if family is None else FAMILIES[family](tmp_path), "cpu"), range(2, 5))


def test_tokens_of_experts_do_not_depend_on_the_batch_on_the_cpu(tmp_path: Path) -> None:
    served = Served(FAMILIES["mixtral"](tmp_path), "cpu")
    for seed in range(3):
        together, alone, _ = run_batch(served, seed)
        for one, other in zip(together, alone, strict=True):
            assert one.token_ids == other.token_ids
            values = [[entry.logprob for entry in each.logprobs] for each in (one, other)]
            np.testing.assert_allclose(*values, atol=1e-4)
