"""`engine_kwargs`: the engine's settings in vLLM's spellings, and what becomes of them here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from ..replicas.errors import ConfigError

# vLLM's settings that change how fast an engine runs or what it logs, but no answer: said aloud and left.
WITHOUT_EFFECT = frozenset(
    {
        "compilation_config",
        "cpu_offload_gb",
        "disable_log_requests",
        "disable_log_stats",
        "distributed_executor_backend",
        "enable_log_requests",
        "max_parallel_loading_workers",
        "max_seq_len_to_capture",
        "num_scheduler_steps",
        "scheduling_policy",
        "speculative_config",
        "swap_space",
        "tokenizer_mode",
        "trust_remote_code",
    }
)
# Settings that would change answers or the layout, each with the values that ask for nothing.
NOT_AVAILABLE: dict[str, tuple[Any, ...]] = {
    "kv_cache_dtype": ("auto",),
    "quantization": (None,),
    "enable_lora": (False,),
    "data_parallel_size": (1,),
    "decode_context_parallel_size": (1,),
    "enable_expert_parallel": (False,),
}
DTYPES = {"half": "float16", "float": "float32"}


class EngineArgs(BaseModel):
    """The settings of one engine. None: chosen from the model and the machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    max_num_seqs: int = Field(default=256, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    block_size: int | None = Field(default=None, ge=1)
    num_gpu_blocks_override: int | None = Field(default=None, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    all_reduce: Literal["auto", "nccl", "symm_mem", "triton"] = "auto"  # who sums over tensor-parallel GPUs
    quantized_all_reduce: bool = False  # large sums travel as int8
    disable_custom_all_reduce: bool = False  # vLLM's spelling of all_reduce nccl
    seed: int = Field(default=0, ge=0)
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    served_model_name: str | None = None
    revision: str | None = None
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(default=None, ge=1)  # torch threads of an engine on CPU; not vLLM's
    enforce_eager: bool = False  # no CUDA graphs
    batch_invariant: bool = False  # bits of a sequence do not depend on its batch; vLLM's VLLM_BATCH_INVARIANT
    step_limit_s: float | None = Field(default=None, gt=0.0)  # of a step that is not stuck; not vLLM's

    def engine_config(self, folder: Path) -> EngineConfig:
        """The engine's own configuration, not yet resolved. Raises ConfigError for settings that exclude each other."""
        return EngineConfig(
            model=ModelConfig(
                path=str(folder),
                dtype=DTYPES.get(self.dtype, self.dtype),
                max_model_len=self.max_model_len,
                load_format="safetensors" if self.load_format == "auto" else self.load_format,
                seed=self.seed,
            ),
            cache=self._cache_config(),
            scheduler=SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                enable_chunked_prefill=self.enable_chunked_prefill,
            ),
            parallel=self._parallel_config(),
            device=self.device,
            num_threads=self.num_threads,
            enforce_eager=self.enforce_eager,
            batch_invariant=self.batch_invariant,
            step_limit_s=self.step_limit_s,
        )

    def _cache_config(self) -> CacheConfig:
        num_blocks, num_bytes = self.num_gpu_blocks_override, self.kv_cache_memory_bytes
        if num_blocks is not None and num_bytes is not None:
            warnings.warn("kv_cache_memory_bytes has no effect beside num_gpu_blocks_override", stacklevel=2)
            num_bytes = None
        return CacheConfig(
            block_size=self.block_size,
            num_blocks=num_blocks,
            enable_prefix_caching=self.enable_prefix_caching,
            gpu_memory_utilization=self.gpu_memory_utilization,
            kv_cache_memory_bytes=num_bytes,
        )

    def _parallel_config(self) -> ParallelConfig:
        all_reduce = self.all_reduce
        if self.disable_custom_all_reduce:
            if all_reduce not in ("auto", "nccl"):
                raise ConfigError(
                    f"disable_custom_all_reduce and all_reduce {all_reduce!r} exclude each other; give one"
                )
            all_reduce = "nccl"
        if self.tensor_parallel_size == 1:
            for name, default in (("all_reduce", "auto"), ("quantized_all_reduce", False)):
                if getattr(self, name) != default:
                    warnings.warn(f"{name} has no effect with tensor_parallel_size 1", stacklevel=2)
        return ParallelConfig(
            self.tensor_parallel_size, self.pipeline_parallel_size, all_reduce, self.quantized_all_reduce
        )

    def in_users_words(self, error: ConfigError) -> ConfigError:
        """What the engine says of its configuration, where that calls a setting by another name than its user."""
        if not self.disable_custom_all_reduce:
            return error
        return ConfigError(error.message.replace("all_reduce 'nccl'", "disable_custom_all_reduce (all_reduce nccl)"))


def without_known(given: dict[str, Any]) -> dict[str, Any]:
    """`given` less vLLM's settings that Shoal does not have: a warning for those that change no answer.

    Raises ConfigError for those that would.
    """
    kept = {}
    for key, value in given.items():
        if key in WITHOUT_EFFECT:
            warnings.warn(f"engine_kwargs.{key} has no effect in Shoal", stacklevel=2)
        elif key in NOT_AVAILABLE:
            if value not in NOT_AVAILABLE[key]:
                raise ConfigError(f"engine_kwargs.{key} = {value!r} is not available yet; leave it out")
        else:
            kept[key] = value
    return kept
