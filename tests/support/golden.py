"""One set of prompts, an engine for any split of a model over ranks, and greedy tokens from it.

`split_engine` turns everything on at once: chunks, the prefix cache, blocks too few for all, and forks by the request.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from shoal.replicas.config import (
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    ResolvedConfig,
    SchedulerConfig,
)
from shoal.replicas.engine.engine import Engine
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.engines import facts

BLOCK_SIZE = 16
MAX_TOKENS = 32
# Of different lengths, none a multiple of the block size; the second shares two blocks with the first.
PROMPTS = (
    tuple((7 * i) % 97 + 4 for i in range(37)),
    (*((7 * i) % 97 + 4 for i in range(35)), 9, 11, 5),
    (17, 4, 99),
    tuple((5 * i * i) % 101 + 3 for i in range(21)),
)


def engine_config(
    folder: Path, tp: int = 1, pp: int = 1, *, num_blocks: int | None = None, max_num_batched_tokens: int = 256
) -> EngineConfig:
    """On CPU, in fp32, with a thread for each rank."""
    return EngineConfig(
        ModelConfig(str(folder), dtype="float32", max_model_len=80),
        CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks, kv_cache_memory_bytes=1 << 22),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=max_num_batched_tokens),
        ParallelConfig(tensor_parallel_size=tp, pipeline_parallel_size=pp),
        device="cpu",
        num_threads=1,
    )


def meeting_config() -> ResolvedConfig:
    """Of two ranks that meet, and load no model."""
    config = engine_config(Path("folder"), tp=2)
    model = replace(facts(), num_attention_heads=2, num_kv_heads=2)
    return replace(config, model=replace(config.model, load_format="dummy")).resolve(model, "cpu")


def split_engine(folder: Path, tp: int, pp: int = 1) -> Engine:
    """Over tp x pp processes, with blocks for some two of the prompts' sequences and chunks of 11 tokens."""
    return build_engine(engine_config(folder, tp, pp, num_blocks=11, max_num_batched_tokens=11))


def greedy(engine: Engine, num_samples: int = 1) -> list[list[list[int]]]:
    """The tokens of PROMPTS, by prompt and sample, all requests being in the engine at once."""
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    requests = [Request(str(i), prompt, sampling, num_samples=num_samples) for i, prompt in enumerate(PROMPTS)]
    completions = generate(engine, requests)
    return [[completion.token_ids for completion in completions[request.request_id]] for request in requests]


def greedy_of_one_process(folder: Path) -> list[list[int]]:
    """The tokens of PROMPTS, each prompt run alone, with room for all of it."""
    engine = build_engine(engine_config(folder))
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    try:
        return [generate(engine, [Request("", prompt, sampling)])[""][0].token_ids for prompt in PROMPTS]
    finally:
        engine.shutdown()


def check_greedy(engine: Engine, expected: list[list[int]]) -> None:
    """PROMPTS have the expected tokens, forked and again from the cache."""
    assert greedy(engine, num_samples=2) == [[tokens, tokens] for tokens in expected]
    assert greedy(engine) == [[tokens] for tokens in expected]


def check_straits(engine: Engine) -> None:
    """The engine has been through preemptions, prefix hits and copies-on-write, and its blocks add up."""
    load = engine.load()
    assert load.num_preemptions > 0
    assert load.prefix_cache_hits > 0
    assert load.blocks.copied > 0
    engine.scheduler.check()
