"""`engine_kwargs`: the engine's settings, in vLLM's spelling."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from ..replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from ..replicas.errors import ConfigError
from .vllm_options import NOT_AVAILABLE, WITHOUT_EFFECT

DTYPES = {"half": "float16", "float": "float32"}
_ENGINE = EngineConfig(ModelConfig(path=""))  # the engine's own defaults


class Flag(NamedTuple):
    """What a field's command-line option has beside its name, type, default and description."""

    short: str | None = None
    envvar: str | None = None


class EngineArgs(BaseModel):
    """The settings of one engine. None: chosen from the model and the machine.

    A field is all that an option needs: the command line, the configuration file and docs/configuration.md take name,
    type, default and description from here.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    served_model_name: str | None = Field(default=None, description="The model's name in requests, instead of MODEL.")
    tokenizer: str | None = Field(default=None, description="Folder or hub id of the tokenizer, if it is not in MODEL.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hugging Face id.")
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = Field(
        default="auto", description="dtype of weights and activations. auto: float32 on CPU, else the checkpoint's."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Longest context, in tokens. Unset: the checkpoint's."
    )
    max_num_seqs: int = Field(default=_ENGINE.scheduler.max_num_seqs, ge=1, description="Most sequences in a step.")
    max_num_batched_tokens: int | None = Field(
        default=None, ge=1, description="Most tokens in a step. Unset: 2048 on CPU, 6144 on GPU."
    )
    block_size: int | None = Field(default=None, ge=1, description="Tokens in a KV block. Unset: 16 on CPU, 64 on GPU.")
    num_gpu_blocks_override: int | None = Field(
        default=None, ge=1, description="KV blocks, on CPU too. Unset: as many as memory holds."
    )
    gpu_memory_utilization: float = Field(
        default=_ENGINE.cache.gpu_memory_utilization,
        gt=0.0,
        le=1.0,
        description="Share of a GPU's memory for weights, activations and KV cache.",
    )
    kv_cache_memory_bytes: int | None = Field(
        default=None, ge=1, description="Bytes of each rank's KV cache. Unset: 1 GiB on CPU, profiled on GPU."
    )
    enable_prefix_caching: bool = Field(
        default=_ENGINE.cache.enable_prefix_caching, description="Reuse KV blocks of equal prefixes."
    )
    enable_chunked_prefill: bool = Field(
        default=_ENGINE.scheduler.enable_chunked_prefill, description="Split a long prompt over several steps."
    )
    tensor_parallel_size: Annotated[int, Flag("-tp")] = Field(
        default=_ENGINE.parallel.tensor_parallel_size, ge=1, description="Ranks that split every layer."
    )
    pipeline_parallel_size: Annotated[int, Flag("-pp")] = Field(
        default=_ENGINE.parallel.pipeline_parallel_size, ge=1, description="Stages that split the stack of layers."
    )
    all_reduce: Literal["auto", "nccl", "symm_mem", "triton"] = Field(
        default="auto", description="All-reduce backend of tensor-parallel GPUs."
    )
    quantized_all_reduce: bool = Field(
        default=_ENGINE.parallel.quantized_all_reduce, description="Send large all-reduces between GPUs as int8."
    )
    disable_custom_all_reduce: bool = Field(default=False, description="vLLM's spelling of all_reduce nccl.")
    seed: int = Field(default=_ENGINE.model.seed, ge=0, description="Seed of random weights; requests have their own.")
    load_format: Literal["auto", "safetensors", "dummy"] = Field(
        default="auto", description="dummy: random weights of the model's shape."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda if there is a GPU.")
    num_threads: int | None = Field(
        default=None, ge=1, description="Torch threads of a rank on CPU. Unset: its share of the cores."
    )
    enforce_eager: bool = Field(
        default=_ENGINE.enforce_eager, description="No CUDA graphs: starts sooner, runs slower."
    )
    batch_invariant: bool = Field(
        default=_ENGINE.batch_invariant, description="A request has the same bits alone and in any batch; slower."
    )
    step_limit_s: float | None = Field(
        default=None,
        gt=0.0,
        description="Seconds after which a step may count as stuck. Unset: 5 on GPU, 60 on CPU.",
    )

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
        """`error` of the engine's configuration with the option names that the user gave."""
        if not self.disable_custom_all_reduce:
            return error
        return ConfigError(error.message.replace("all_reduce 'nccl'", "disable_custom_all_reduce (all_reduce nccl)"))


def without_known(given: dict[str, Any]) -> dict[str, Any]:
    """`given` without vLLM's options that Shoal does not have; a warning for those without effect.

    Raises ConfigError for an option that is not available, unless its value asks for nothing.
    """
    kept = {}
    for key, value in given.items():
        if key in WITHOUT_EFFECT:
            warnings.warn(f"engine_kwargs.{key} has no effect in Shoal: {WITHOUT_EFFECT[key].reason}", stacklevel=2)
        elif key not in NOT_AVAILABLE:
            kept[key] = value
        elif value not in NOT_AVAILABLE[key].harmless:
            reason = NOT_AVAILABLE[key].reason
            raise ConfigError(f"engine_kwargs.{key} = {value!r} is not available yet: {reason}; leave it out")
    return kept
