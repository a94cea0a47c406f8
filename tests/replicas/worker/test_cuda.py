"""The same engine on a CUDA device gives the tokens that it gives on the CPU, for every family."""

from pathlib import Path

import pytest

import shoal
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.checkpoints import FAMILIES

TINY = Path(shoal.__file__).parent / "deploy" / "models" / "tiny"

pytestmark = pytest.mark.gpu


def run(folder: Path, device: str, sampling: SamplingParams, *, vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Tokens of four prompts, two samples each, batched and prefilled in chunks."""
    config = EngineConfig(
        ModelConfig(str(folder), dtype="float32", max_model_len=max_model_len),
        CacheConfig(block_size=16, num_blocks=512),
        SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=32),
        device=device,
        num_threads=1,  # more would spin for cores that tests beside this one use, and go on after it
    )
    engine = build_engine(config)
    prompts = [tuple((37 * i + 11 * p) % (vocab_size - 8) + 5 for i in range(7 + 15 * p)) for p in range(4)]
    try:
        completions = generate(engine, [Request(str(p), prompt, sampling, 2) for p, prompt in enumerate(prompts)])
    finally:
        engine.shutdown()
    return [completion.token_ids for samples in completions.values() for completion in samples]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_of_the_shipped_model_equal_those_of_the_cpu(temperature):
    sampling = SamplingParams(
        max_tokens=200, temperature=temperature, top_p=0.95, frequency_penalty=0.1, seed=7, ignore_eos=True
    )
    shape = {"vocab_size": 4096, "max_model_len": 512}
    assert run(TINY, "cuda", sampling, **shape) == run(TINY, "cpu", sampling, **shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_every_family_equal_those_of_the_cpu(family, tmp_path):
    folder = FAMILIES[family](tmp_path)
    sampling = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
    shape = {"vocab_size": 100, "max_model_len": 128}
    assert run(folder, "cuda", sampling, **shape) == run(folder, "cpu", sampling, **shape)
