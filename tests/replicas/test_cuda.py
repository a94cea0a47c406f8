"""The same engine on a CUDA device gives the tokens that it gives on the CPU."""

from pathlib import Path

import pytest
import torch

import shoal
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.llm import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams

TINY = Path(shoal.__file__).parent / "deploy" / "models" / "tiny"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(device: str, sampling: SamplingParams, **cache) -> list[list[int]]:
    """Tokens of four prompts, two samples each, batched and prefilled in chunks."""
    config = EngineConfig(
        ModelConfig(str(TINY), dtype="float32"),
        CacheConfig(block_size=16, **cache),
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64),
        device=device,
    )
    engine = build_engine(config)
    prompts = [tuple((37 * i + 11 * p) % 4000 + 5 for i in range(10 + 40 * p)) for p in range(4)]
    try:
        completions = generate(engine, [Request(str(p), prompt, sampling, 2) for p, prompt in enumerate(prompts)])
    finally:
        engine.shutdown()
    return [completion.token_ids for samples in completions.values() for completion in samples]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_equal_those_of_the_cpu(temperature):
    sampling = SamplingParams(
        max_tokens=100, temperature=temperature, top_p=0.95, frequency_penalty=0.1, seed=7, ignore_eos=True
    )
    assert run("cuda", sampling) == run("cpu", sampling, num_blocks=512)
