"""What a configuration becomes on each device."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts, ParallelConfig, SchedulerConfig
from shoal.replicas.errors import ConfigError

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


def test_a_pipeline_has_two_steps_in_flight_for_each_stage():
    config = EngineConfig(ModelConfig("folder"))
    assert config.resolve(FACTS, "cpu").scheduler.max_steps_in_flight == 2
    piped = replace(config, parallel=ParallelConfig(pipeline_parallel_size=2))
    assert piped.resolve(FACTS, "cpu").scheduler.max_steps_in_flight == 4
    with pytest.raises(ConfigError, match="max_steps_in_flight is 1; it must be at least 2"):
        replace(piped, scheduler=SchedulerConfig(max_steps_in_flight=1)).resolve(FACTS, "cpu")


@pytest.mark.parametrize(("tp", "pp", "num_blocks"), [(1, 1, 64), (2, 1, 128), (4, 1, 128), (1, 2, 128), (2, 2, 256)])
def test_memory_of_the_kv_cache_is_that_of_a_rank(tp, pp, num_blocks):
    """A block of 64 tokens takes 16 KiB of a single rank; the two kv heads are halved once."""
    cache = CacheConfig(block_size=64, kv_cache_memory_bytes=1 << 20)
    config = EngineConfig(ModelConfig("folder", max_model_len=64), cache, parallel=ParallelConfig(tp, pp))
    assert config.resolve(FACTS, "cuda").cache.num_blocks == num_blocks


def split(tp: int = 1, pp: int = 1, *, facts: ModelFacts = FACTS, device: str = "cpu", **more) -> ParallelConfig:
    config = EngineConfig(ModelConfig("folder"), parallel=ParallelConfig(tp, pp, **more))
    return config.resolve(facts, device).parallel


def test_a_split_that_the_model_takes():
    assert split(4, 2).world_size == 8  # kv heads are fewer than the ranks: repeated


@pytest.mark.parametrize(
    ("tp", "pp", "changed", "told"),
    [
        (3, 1, {}, "tensor_parallel_size 3 does not divide the model's 4 attention heads; this model takes 1, 2, 4"),
        (8, 1, {}, "4 attention heads"),
        (4, 1, {"num_attention_heads": 8, "num_kv_heads": 6}, "neither divides the model's 6 kv heads nor"),
        (4, 1, {"intermediate_sizes": (64, 90)}, "does not divide the 90 intermediate features"),
        (1, 3, {}, "pipeline_parallel_size 3 is above the model's 2 layers"),
        (0, 1, {}, "at least 1"),
    ],
)
def test_splits_that_cannot_be_are_told_with_those_that_can(tp, pp, changed, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        split(tp, pp, facts=replace(FACTS, **changed))


def test_collectives_of_gpus_are_not_to_be_had_on_cpu():
    with pytest.raises(ConfigError, match="'ring' is not known; use one of auto, nccl, symm_mem, triton"):
        split(2, device="cuda", all_reduce="ring")
    with pytest.raises(ConfigError, match="all_reduce 'nccl' is for GPUs"):
        split(2, all_reduce="nccl")
    with pytest.raises(ConfigError, match="quantized_all_reduce is for GPUs"):
        split(2, quantized_all_reduce=True)
    assert split(2, device="cuda", all_reduce="triton", quantized_all_reduce=True).quantized_all_reduce


def test_sums_that_depend_on_the_batch_are_not_batch_invariant():
    config = EngineConfig(ModelConfig("folder"), parallel=ParallelConfig(2, quantized_all_reduce=True))
    with pytest.raises(ConfigError, match="batch_invariant"):
        replace(config, batch_invariant=True).resolve(FACTS, "cuda")
    for num_ranks, kind in ((4, "nccl"), (4, "symm_mem")):
        config = EngineConfig(ModelConfig("folder"), parallel=ParallelConfig(num_ranks, all_reduce=kind))
        with pytest.raises(ConfigError, match="sums over 4 ranks in an order"):
            replace(config, batch_invariant=True).resolve(FACTS, "cuda")
    two = EngineConfig(ModelConfig("folder"), parallel=ParallelConfig(2, all_reduce="nccl"), batch_invariant=True)
    assert two.resolve(FACTS, "cuda").batch_invariant  # a sum of two has one order
