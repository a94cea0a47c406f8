"""Steps run in more room than they need, as in a CUDA graph, give what they give in just their own."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch

from shoal.kernels.backend import Backend, use_backend
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from shoal.replicas.layers.batch import GraphShape
from shoal.replicas.layers.kv_cache import KVCache
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from shoal.replicas.worker.graphs import decode_shapes, mixed_shapes
from shoal.replicas.worker.runner import Runner
from tests.support.checkpoints import FAMILIES, VOCAB_SIZE
from tests.support.stages import StagesInTurn


def run(folder: Path, num_stages: int = 1) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of prompts that are prefilled in chunks, forked, and decoded beside each other."""
    config = EngineConfig(
        ModelConfig(str(folder), dtype="float32", max_model_len=64),
        CacheConfig(block_size=16, num_blocks=24),
        SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=16),
        ParallelConfig(pipeline_parallel_size=num_stages),
        device="cpu",
    )
    greedy = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, logprobs=1)
    drawn = SamplingParams(max_tokens=3, temperature=0.9, top_k=20, seed=3, ignore_eos=True)
    wishing = SamplingParams(max_tokens=3, temperature=0.7, repetition_penalty=1.3, seed=5, ignore_eos=True)
    prompts = [tuple((37 * i + 11 * p) % (VOCAB_SIZE - 8) + 5 for i in range(3 + 9 * p)) for p in range(3)]
    engine = build_engine(config, start=StagesInTurn if num_stages > 1 else None)
    try:
        completions = generate(
            engine,
            [
                Request("a", prompts[2], greedy),
                Request("b", prompts[1], drawn, num_samples=2),
                Request("c", prompts[0], wishing),
            ],
        )
    finally:
        engine.shutdown()
    return [
        (each.token_ids, [one.logprob for one in each.logprobs]) for found in completions.values() for each in found
    ]


@pytest.mark.parametrize(
    ("family", "num_stages"),
    [("llama", 1), ("mixtral", 1), ("llama", 2), pytest.param("mixtral", 2, marks=pytest.mark.slow)],
)
def test_padding_changes_nothing(family, num_stages, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")
    folder = FAMILIES[family](tmp_path)
    want = run(folder)

    rooms = []

    def padded(self: Runner, room: GraphShape):
        rooms.append(room)
        return forward(self, GraphShape(room.tokens + 5, 5, 3 if room.prefills else 0, 5))

    forward = Runner.forward
    monkeypatch.setattr(Runner, "forward", padded)
    with use_backend(Backend.INTERPRET):
        got = run(folder, num_stages)
    assert any(room.prefills and room.decodes for room in rooms), "a mixed step was run"
    assert any(not room.prefills for room in rooms), "a decode step was run"
    for (got_tokens, got_logprobs), (tokens, logprobs) in zip(got, want, strict=True):
        assert got_tokens == tokens
        torch.testing.assert_close(got_logprobs, logprobs, rtol=0, atol=1e-4)


def test_rooms_of_graphs_cover_every_step_they_may():
    decode, mixed = decode_shapes(200), mixed_shapes(200, 2048)
    assert all(any(room.holds(GraphShape(size, size, 0, size)) for room in decode) for size in range(1, 201))
    assert mixed[-1].tokens == 2048
    for tokens in range(2, 2049):
        for decodes in {0, 1, min(tokens - 1, 16), min(tokens - 1, 200)}:
            fitting = next(room for room in mixed if room.holds(GraphShape(tokens, decodes, 1, min(decodes + 1, 200))))
            assert fitting.tokens - tokens < max(64, tokens / 7), "padding costs as much as what is served"
            assert fitting.decodes == decodes or fitting.decodes <= 16 or decodes > 16
    for tokens, prefills in ((40, 5), (320, 40), (2048, 190)):  # short prompts, or what a prefix cache left of them
        fitting = next(room for room in mixed if room.holds(GraphShape(tokens, 0, prefills, prefills)))
        assert fitting.tokens == max(64, tokens)
    assert decode_shapes(3) == [GraphShape(1, 1, 0, 1), GraphShape(2, 2, 0, 2), GraphShape(3, 3, 0, 3)]


def test_the_memory_of_an_engine_goes_with_it(tmp_path, monkeypatch):
    """A cycle among its objects would keep weights and KV cache until the garbage collector comes by: a GPU has no
    room for the cache of the memory profile, or of the engine before, beside the next one."""
    caches = []
    make = KVCache.__init__

    def watched(self: KVCache, *args, **kwargs) -> None:
        caches.append(weakref.ref(self))
        make(self, *args, **kwargs)

    monkeypatch.setattr(KVCache, "__init__", watched)
    folder = FAMILIES["llama"](tmp_path)
    gc.collect()
    gc.disable()
    try:
        run(folder)
        assert len(caches) == 1
        assert caches[0]() is None
    finally:
        gc.enable()
