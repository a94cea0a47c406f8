"""What a configuration becomes on each device."""

from __future__ import annotations

import pytest

from shoal.replicas.config import EngineConfig, ModelConfig, ModelFacts, SchedulerConfig

FACTS = ModelFacts("LlamaForCausalLM", 2, 64, 4, 2, 16, 100, 4096, (1,), "bfloat16")


@pytest.mark.parametrize(
    ("device", "dtype", "block_size", "budget"), [("cpu", "float32", 16, 2048), ("cuda", "bfloat16", 64, 6144)]
)
def test_automatic_values_follow_the_device(device, dtype, block_size, budget):
    resolved = EngineConfig(ModelConfig("folder")).resolve(FACTS, device)
    assert resolved.model.dtype == dtype
    assert resolved.cache.block_size == block_size
    assert resolved.scheduler.max_num_batched_tokens == budget


def test_an_automatic_budget_lets_every_sequence_decode():
    config = EngineConfig(ModelConfig("folder"), scheduler=SchedulerConfig(max_num_seqs=9000))
    assert config.resolve(FACTS, "cuda").scheduler.max_num_batched_tokens == 9000
