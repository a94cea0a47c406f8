"""What users configure: Ray Serve LLM's shapes, vLLM's spellings, and errors that name the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.deploy.config import (
    TINY_MODEL,
    LLMConfig,
    LLMServingArgs,
    ModelPlan,
    ServeConfig,
    from_dict,
    model_folder,
    plan_model,
)
from shoal.replicas.errors import ConfigError, ModelError


def llm(**kwargs: Any) -> dict[str, Any]:
    return {"model_loading_config": {"model_id": "tiny"}, **kwargs}


def plan(**engine: Any) -> ModelPlan:
    return plan_model(from_dict(LLMConfig, llm(engine_kwargs=engine)), device="cpu")


def test_ray_serve_llm_configuration() -> None:
    args = from_dict(
        LLMServingArgs,
        {
            "llm_configs": [
                llm(
                    engine_kwargs={"max_model_len": 512, "dtype": "half", "max_num_seqs": 8, "seed": 3},
                    accelerator_type="H200",
                    deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
                    runtime_env={"env_vars": {"A": "b"}},
                )
            ]
        },
    )
    [config] = args.llm_configs
    engine = plan_model(config, device="cpu").engine
    assert (engine.model.max_model_len, engine.model.dtype, engine.model.seed) == (512, "float16", 3)
    assert engine.scheduler.max_num_seqs == 8


def test_vllm_spellings_reach_the_engine() -> None:
    engine = plan(
        block_size=32,
        num_gpu_blocks_override=99,
        enable_prefix_caching=False,
        enable_chunked_prefill=True,
        max_num_batched_tokens=512,
        gpu_memory_utilization=0.5,
        load_format="dummy",
        num_threads=1,
        batch_invariant=True,
    ).engine
    assert (engine.cache.block_size, engine.cache.num_blocks, engine.cache.enable_prefix_caching) == (32, 99, False)
    assert (engine.cache.gpu_memory_utilization, engine.model.load_format) == (0.5, "dummy")
    assert (engine.scheduler.max_num_batched_tokens, engine.num_threads) == (512, 1)
    assert engine.batch_invariant


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"modles": []}, "unknown key 'modles'; did you mean 'models'?"),
        ({"models": []}, "models"),
        ({"models": [{}]}, "models.0.model_loading_config is required"),
        ({"models": [llm(engine_kwarg={})]}, "did you mean 'engine_kwargs'?"),
        ({"models": [llm(engine_kwargs={"max_modle_len": 5})]}, "did you mean 'max_model_len'?"),
        ({"models": [llm(engine_kwargs={"max_model_len": "5"})]}, "models.0.engine_kwargs.max_model_len"),
        ({"models": [llm(engine_kwargs={"dtype": "float8"})]}, "bfloat16"),
        ({"models": [llm(engine_kwargs={"quantization": "awq"})]}, "quantization = 'awq' is not available"),
        ({"models": [llm(deployment_config={"num_replica": 2})]}, "did you mean 'num_replicas'?"),
        ({"models": [llm(deployment_config={"num_replicas": 0})]}, "num_replicas"),
        ({"models": [llm(deployment_config={"num_replicas": 1, "autoscaling_config": {}})]}, "exclude each other"),
        ({"models": [{"model_loading_config": {"model_id": "m", "sorce": 1}}]}, "unknown key"),
        ({"models": [llm(), llm()]}, "one name"),
        ({"models": [llm()], "api_keys": [""]}, "empty"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_errors_name_the_key(value: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(ServeConfig, value)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"max_model_len": 5000}, "5000"),
        ({"block_size": 24}, "24"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "32"),
        ({"num_gpu_blocks_override": 2}, "2 blocks"),
        ({"tensor_parallel_size": 6}, "tensor_parallel_size 6"),
        ({"pipeline_parallel_size": 9}, "8 layers"),
        ({"tensor_parallel_size": 2, "all_reduce": "symm_mem"}, "GPUs"),
        ({"tensor_parallel_size": 2, "disable_custom_all_reduce": True}, "^disable_custom_all_reduce .*is for GPUs"),
    ],
    ids=str,
)
def test_values_that_cannot_work_together(engine: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**engine)


def test_the_ranks_of_a_model() -> None:
    parallel = plan(tensor_parallel_size=4, pipeline_parallel_size=2).engine.parallel
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.world_size) == (4, 2, 8)
    llm_config = from_dict(
        LLMConfig,
        llm(engine_kwargs={"tensor_parallel_size": 2, "all_reduce": "triton", "quantized_all_reduce": True}),
    )
    parallel = plan_model(llm_config, device="cuda").engine.parallel
    assert (parallel.all_reduce, parallel.quantized_all_reduce) == ("triton", True)
    llm_config = from_dict(LLMConfig, llm(engine_kwargs={"tensor_parallel_size": 2, "disable_custom_all_reduce": True}))
    assert plan_model(llm_config, device="cuda").engine.parallel.all_reduce == "nccl"


def test_bundles_are_one_for_each_rank() -> None:
    config = from_dict(LLMConfig, llm(placement_group_config={"bundles": [{"CPU": 1}] * 2}))
    with pytest.raises(ConfigError, match="2 bundles and the model 1 ranks"):
        plan_model(config, device="cpu")
    with pytest.raises(ConfigError, match="exclude each other"):
        from_dict(LLMConfig, llm(placement_group_config={"bundles": [], "bundle_per_worker": {}}))
    with pytest.raises(ConfigError, match="STRICT_PACK"):
        from_dict(LLMConfig, llm(placement_group_config={"strategy": "PACKED"}))


def test_settings_without_effect_are_said() -> None:
    with pytest.warns(UserWarning, match="quantized_all_reduce has no effect with tensor_parallel_size 1"):
        from_dict(LLMConfig, llm(engine_kwargs={"quantized_all_reduce": True})).engine_kwargs.engine_config(TINY_MODEL)
    with pytest.warns(UserWarning, match="kv_cache_memory_bytes has no effect beside num_gpu_blocks_override"):
        cache = plan(num_gpu_blocks_override=999, kv_cache_memory_bytes=1 << 20).engine.cache
    assert cache.num_blocks == 999
    with pytest.warns(UserWarning, match="swap_space has no effect"):
        assert plan(swap_space=4).engine == plan().engine
    with pytest.warns(UserWarning, match="log_engine_metrics has no effect"):
        from_dict(LLMConfig, llm(log_engine_metrics=True))


def test_names_and_folders(tmp_path: Path) -> None:
    assert plan().name == "tiny"
    assert plan(served_model_name="other").name == "other"
    assert model_folder("tiny") == TINY_MODEL
    with pytest.raises(ModelError, match="nowhere"):
        model_folder(str(tmp_path / "nowhere"))
    broken = from_dict(LLMConfig, {"model_loading_config": {"model_id": "m", "model_source": str(tmp_path)}})
    with pytest.raises(ModelError, match=r"config\.json"):
        plan_model(broken, device="cpu")
