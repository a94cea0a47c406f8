"""What a configuration becomes on each device."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from shoal.kernels.comm.all_reduce import WORLD_SIZES
from shoal.replicas.config import (
    SYMMETRIC_SIZES,
    BlocksInMemory,
    CacheConfig,
    EngineConfig,
    ModelConfig,
    ModelFacts,
    ParallelConfig,
    SchedulerConfig,
)
from shoal.replicas.errors import ConfigError
from shoal.replicas.offline import build_engine
from tests.support.checkpoints import FAMILIES
from tests.support.processes import children

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
    assert config.resolve(FACTS, "cuda").cache.blocks == BlocksInMemory(1 << 20, num_blocks)


def test_a_stage_with_more_layers_than_the_others_has_room_for_fewer_blocks():
    """The head stands on the last of two stages, which has three layers of eight then."""
    facts = replace(FACTS, num_layers=8, vocab_size=2000, mlp_features=(256,) * 8)
    cache = CacheConfig(block_size=64, kv_cache_memory_bytes=5 << 15)
    config = EngineConfig(ModelConfig("folder", max_model_len=64), cache, parallel=ParallelConfig(1, 2))
    equal_stages = config.resolve(replace(facts, mlp_features=()), "cuda")
    assert equal_stages.cache.blocks == BlocksInMemory(5 << 15, 5)
    assert config.resolve(facts, "cuda").cache.blocks == BlocksInMemory(5 << 15, 4)
    with pytest.raises(ConfigError, match="holds 4 blocks of 64 tokens, less than one sequence of max_model_len 320"):
        replace(config, model=replace(config.model, max_model_len=320)).resolve(facts, "cuda")


def split(tp: int = 1, pp: int = 1, *, facts: ModelFacts = FACTS, device: str = "cpu", **more) -> ParallelConfig:
    config = EngineConfig(ModelConfig("folder"), parallel=ParallelConfig(tp, pp, **more))
    return config.resolve(facts, device).parallel


def test_a_split_that_the_model_takes():
    assert split(4, 2).world_size == 8  # kv heads are fewer than the ranks: repeated


@pytest.mark.parametrize(
    ("tp", "pp", "changed", "message"),
    [
        (3, 1, {}, "tensor_parallel_size 3 does not divide the model's 4 attention heads; this model takes 1, 2, 4"),
        (8, 1, {}, "4 attention heads"),
        (4, 1, {"num_attention_heads": 8, "num_kv_heads": 6}, "neither divides the model's 6 kv heads nor"),
        (4, 1, {"intermediate_sizes": (64, 90)}, "does not divide the 90 intermediate features"),
        (4, 1, {"norms_all_kv_heads": True}, "is above the model's 2 kv heads, and one norm spans them all"),
        (4, 1, {"norms_all_kv_heads": True}, "this model takes 1, 2"),
        (1, 3, {}, "pipeline_parallel_size 3 is above the model's 2 layers"),
        (0, 1, {}, "at least 1"),
    ],
)
def test_an_impossible_split_is_an_error_that_lists_the_possible_ones(tp, pp, changed, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        split(tp, pp, facts=replace(FACTS, **changed))


@pytest.mark.parametrize(
    ("family", "tp", "pp", "message"),
    [
        ("olmo2", 4, 1, "tensor_parallel_size 4 is above the model's 2 kv heads"),
        ("llama", 3, 1, "tensor_parallel_size 3 does not divide the model's 4 attention heads"),
        ("llama", 1, 4, "pipeline_parallel_size 4 is above the model's 3 layers"),
    ],
)
def test_a_split_that_cannot_be_starts_no_process(family, tp, pp, message, tmp_path):
    config = EngineConfig(
        ModelConfig(str(FAMILIES[family](tmp_path))), parallel=ParallelConfig(tp, pp), device="cpu", num_threads=1
    )
    before = children()
    with pytest.raises(ConfigError, match=message):
        build_engine(config)
    with pytest.raises(ConfigError, match=message):
        build_engine(config, start=lambda resolved: pytest.fail(f"{resolved} was to be started"))
    assert children() == before


def test_collectives_of_gpus_are_not_to_be_had_on_cpu():
    with pytest.raises(ConfigError, match="'ring' is not known; use one of auto, nccl, symm_mem, triton"):
        split(2, device="cuda", all_reduce="ring")
    with pytest.raises(ConfigError, match="all_reduce 'nccl' is for GPUs"):
        split(2, all_reduce="nccl")
    with pytest.raises(ConfigError, match="quantized_all_reduce is for GPUs"):
        split(2, quantized_all_reduce=True)
    assert split(2, device="cuda", all_reduce="triton", quantized_all_reduce=True).quantized_all_reduce


def test_who_sums_is_able_to_sum_so():
    six = replace(FACTS, num_attention_heads=6, num_kv_heads=6)
    assert SYMMETRIC_SIZES == WORLD_SIZES
    assert split(6, facts=six, device="cuda").all_reduce == "auto"
    assert split(6, facts=six, device="cuda", all_reduce="nccl").all_reduce == "nccl"
    for more, named in (
        ({"all_reduce": "triton"}, "all_reduce 'triton'"),
        ({"all_reduce": "symm_mem"}, "all_reduce 'symm_mem'"),
        ({"quantized_all_reduce": True}, "quantized_all_reduce"),
    ):
        with pytest.raises(ConfigError, match=rf"{named} .* for 2, 4, 8 ranks, and tensor_parallel_size is 6; leave"):
            split(6, facts=six, device="cuda", **more)
    invariant = EngineConfig(ModelConfig("folder"), parallel=ParallelConfig(6), batch_invariant=True)
    with pytest.raises(ConfigError, match="batch_invariant sums over symmetric memory"):
        invariant.resolve(six, "cuda")
    assert invariant.resolve(six, "cpu").batch_invariant
    for kind in ("nccl", "symm_mem"):
        with pytest.raises(ConfigError, match=f"own kernels, and all_reduce '{kind}' leaves every sum to others"):
            split(2, device="cuda", all_reduce=kind, quantized_all_reduce=True)


def test_torchs_operators_do_not_sum_half_precision():
    half = replace(FACTS, dtype="float16")
    with pytest.raises(ConfigError, match=r"'symm_mem' sums float32 and bfloat16, .* and dtype is float16; take"):
        split(2, facts=half, device="cuda", all_reduce="symm_mem")
    assert split(2, facts=half, device="cuda", all_reduce="triton").all_reduce == "triton"
    assert split(2, device="cuda", all_reduce="symm_mem").all_reduce == "symm_mem"


def test_blocks_that_attention_on_a_gpu_does_not_read():
    config = EngineConfig(ModelConfig("folder"), CacheConfig(block_size=256))
    assert config.resolve(FACTS, "cpu").cache.block_size == 256
    with pytest.raises(
        ConfigError, match=r"block_size 256 is not supported by GPU attention; use one of 16, 32, 64, 128"
    ):
        config.resolve(FACTS, "cuda")


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
