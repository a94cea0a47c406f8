"""Steps replayed from CUDA graphs give what steps launched one kernel at a time give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import shoal
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.offline import Completion, build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams

TINY = Path(shoal.__file__).parent / "deploy" / "models" / "tiny"

pytestmark = pytest.mark.gpu
CONFIG = EngineConfig(
    ModelConfig(str(TINY), dtype="float32", max_model_len=512),
    CacheConfig(block_size=16, num_blocks=96),
    SchedulerConfig(max_num_seqs=24, max_num_batched_tokens=96),
    device="cuda",
)


def requests() -> list[Request]:
    """Chunked prefill beside decode, forks, more sequences than blocks (preemption), sampling options and
    log-probabilities.
    """
    greedy = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    kinds = [
        greedy,
        replace(greedy, logprobs=3, prompt_logprobs=2),
        SamplingParams(max_tokens=50, temperature=0.9, top_p=0.9, top_k=40, seed=11, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0.7, repetition_penalty=1.2, seed=12, ignore_eos=True),
        SamplingParams(max_tokens=45, temperature=1.0, min_p=0.05, seed=13, ignore_eos=True),
    ]
    prompts = [tuple((41 * i + 13 * p) % 4000 + 5 for i in range(5 + 17 * (p % 9))) for p in range(30)]
    return [Request(str(p), prompt, kinds[p % len(kinds)], 2 if p % 7 == 0 else 1) for p, prompt in enumerate(prompts)]


def run(config: EngineConfig) -> tuple[dict[str, list[Completion]], int]:
    engine = build_engine(config)
    try:
        return generate(engine, requests()), engine.load().num_preemptions
    finally:
        engine.shutdown()


def test_graphs_change_nothing():
    got, preemptions = run(CONFIG)
    want, _ = run(replace(CONFIG, enforce_eager=True))
    assert preemptions > 0, "the blocks suffice for all; the test means to run short of them"
    for request_id, samples in want.items():
        for expected, sample in zip(samples, got[request_id], strict=True):
            assert sample.token_ids == expected.token_ids, request_id
            logprobs = [one.logprob for one in sample.logprobs]
            assert logprobs == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-3)
            assert (sample.prompt_logprobs is None) == (expected.prompt_logprobs is None)


def test_memory_is_profiled_and_graphs_are_captured():
    engine = build_engine(
        EngineConfig(ModelConfig(str(TINY)), CacheConfig(gpu_memory_utilization=0.3), SchedulerConfig(), device="cuda")
    )
    try:
        _, total = torch.cuda.mem_get_info()
        held = torch.cuda.memory_reserved()
        assert 0.2 * total < held < 0.31 * total, "as much of the device is taken as gpu_memory_utilization says"
        assert engine.load().num_blocks > 1000
        sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        (completion,) = generate(engine, [Request("one", tuple(range(5, 300)), sampling)])["one"]
        assert len(completion.token_ids) == 20
    finally:
        engine.shutdown()
