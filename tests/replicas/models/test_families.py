"""Every family's greedy tokens equal transformers' own, whatever the engine does with the sequence.

transformers runs one whole sequence without a cache: each token must be the argmax after those
before it.
"""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.offline import build_engine
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.checkpoints import FAMILIES

STEPS = 64
MAX_MODEL_LEN = 128
# Of different lengths, none a multiple of the block size; the second shares two blocks with the first.
PROMPTS = (
    tuple((7 * i) % 97 + 4 for i in range(37)),
    (*((7 * i) % 97 + 4 for i in range(35)), 9, 11, 5),
    (17, 4, 99),
    tuple((5 * i * i) % 101 + 3 for i in range(21)),
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a family's tiny random checkpoint, made once."""

    @lru_cache
    def make(family: str) -> Path:
        return FAMILIES[family](tmp_path_factory.mktemp(family))

    return make


@pytest.fixture(scope="session")
def expected(checkpoint):
    """Greedy continuations of PROMPTS by transformers, as far as an engine that runs them in a batch is right."""

    @lru_cache
    def run(family: str) -> tuple[tuple[int, ...], ...]:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32)
        model.eval()
        engine = make_engine(checkpoint(family))
        guesses = generate(engine, PROMPTS)
        engine.shutdown()
        return tuple(_greedy(model, prompt, guess) for prompt, (guess,) in zip(PROMPTS, guesses, strict=True))

    return run


@torch.inference_mode()
def _greedy(model, prompt: tuple[int, ...], guess: tuple[int, ...]) -> tuple[int, ...]:
    """The guess if it is right; else what it has right, and the token that should have been next."""
    assert len(guess) == STEPS
    logits = model(torch.tensor([prompt + guess]), use_cache=False).logits
    best = logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    wrong = next((i for i in range(STEPS) if best[i] != guess[i]), STEPS)
    return tuple(best[: wrong + 1])


def make_engine(folder: Path, **settings) -> Engine:
    cache = {"block_size": 16, "num_blocks": 64, "enable_prefix_caching": False}
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 256}
    for name, value in settings.items():
        (cache if name in CacheConfig.__dataclass_fields__ else scheduler)[name] = value
    model = ModelConfig(str(folder), dtype="float32", max_model_len=MAX_MODEL_LEN)
    return build_engine(
        EngineConfig(model, CacheConfig(**cache), SchedulerConfig(**scheduler), device="cpu", num_threads=1)
    )


def generate(engine: Engine, prompts, **request_fields) -> list[list[tuple[int, ...]]]:
    """Tokens by prompt and sample, with every request in the engine at once."""
    sampling = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(Request(str(i), prompt, sampling, **request_fields))
    tokens: dict[tuple[int, int], list[int]] = {}
    while engine.has_work:
        for delta in engine.step():
            tokens.setdefault((int(delta.request_id), delta.sample), []).extend(delta.token_ids)
    num_samples = request_fields.get("num_samples", 1)
    return [[tuple(tokens[i, sample]) for sample in range(num_samples)] for i in range(len(prompts))]


@pytest.fixture
def engine_for(checkpoint):
    engines = []

    def make(family: str, **settings) -> Engine:
        engines.append(make_engine(checkpoint(family), **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
class TestGreedyTokensEqualTransformers:
    def test_alone(self, family, engine_for, expected):
        engine = engine_for(family)
        for prompt, tokens in zip(PROMPTS, expected(family), strict=True):
            assert generate(engine, [prompt]) == [[tokens]]

    def test_in_a_batch(self, family, engine_for, expected):
        assert generate(engine_for(family), PROMPTS) == [[tokens] for tokens in expected(family)]

    def test_with_chunked_prefill(self, family, engine_for, expected):
        engine = engine_for(family, max_num_batched_tokens=11)
        assert generate(engine, PROMPTS) == [[tokens] for tokens in expected(family)]

    def test_with_a_prefix_cache_hit(self, family, engine_for, expected):
        engine = engine_for(family, enable_prefix_caching=True)
        assert generate(engine, PROMPTS[:1]) == [[expected(family)[0]]]
        assert engine.load().prefix_cache_hits == 0
        assert generate(engine, PROMPTS) == [[tokens] for tokens in expected(family)]
        assert engine.load().prefix_cache_hits == 2 * 2 * 16  # two blocks each of the first and the second prompt

    def test_with_preemption(self, family, engine_for, expected):
        engine = engine_for(family, num_blocks=11)
        assert generate(engine, PROMPTS) == [[tokens] for tokens in expected(family)]
        assert engine.load().num_preemptions > 0

    def test_with_a_fork(self, family, engine_for, expected):
        engine = engine_for(family)
        forked = generate(engine, PROMPTS, num_samples=2)
        assert forked == [[tokens, tokens] for tokens in expected(family)]
        assert engine.load().blocks.copied > 0
