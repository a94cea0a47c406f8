"""The engine's configuration: frozen, standard library only, resolved once.

A user's settings arrive with "auto" (None) in them; `EngineConfig.resolve(model, device)` is pure and returns a
copy in which every field has a value. Nothing changes a configuration afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import ConfigError
from .stages import layer_cost, split_costs

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine must know of a checkpoint before it is loaded; read from its config.json."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    dtype: str  # the checkpoint's own
    num_parameters: int = 0  # 0: unknown
    intermediate_sizes: tuple[int, ...] = ()  # of the MLP, and of an expert; empty where config.json does not say
    mlp_features: tuple[int, ...] = ()  # of each layer, those of all its experts; empty where config.json does not say
    norms_all_kv_heads: bool = False  # one norm over the keys of all heads, each of which then stands there once

    def kv_bytes_per_token(self, dtype: str, tp: int = 1, pp: int = 1) -> int:
        """Bytes of keys and values that one token takes over all layers, or on the rank of tp x pp that has most.

        Heads are repeated where there are fewer than ranks.
        """
        num_heads = max(1, self.num_kv_heads // tp)
        return 2 * self._most_layers(pp) * num_heads * self.head_dim * DTYPE_BYTES[dtype]

    def _most_layers(self, num_stages: int) -> int:
        """Layers of the stage that has most; of stages alike, where what layers cost is not known."""
        if num_stages == 1 or not self.mlp_features:
            return -(-self.num_layers // num_stages)
        heads = self.num_attention_heads, self.num_kv_heads, self.head_dim
        costs = [layer_cost(self.hidden_size, *heads, features) for features in self.mlp_features]
        return max(map(len, split_costs(costs, self.vocab_size * self.hidden_size, num_stages)))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    path: str  # a local folder
    dtype: str = "auto"  # float32, float16, bfloat16; auto: float32 on CPU (exact, replayable), else the checkpoint's
    max_model_len: int | None = None
    load_format: str = "safetensors"  # or dummy: random weights
    seed: int = 0


@dataclass(frozen=True, slots=True)
class CacheConfig:
    block_size: int | None = None  # tokens; auto: 16 on CPU, 64 on GPU
    num_blocks: int | None = None  # auto: from memory
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None  # of each rank; auto: 1 GiB on CPU, profiled on GPU


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # token budget of a step; auto: 2048 on CPU, 6144 on GPU
    enable_chunked_prefill: bool = True
    max_steps_in_flight: int | None = None  # auto: 2, and 2 for each stage of a pipeline


ALL_REDUCES = ("auto", "nccl", "symm_mem", "triton")
SYMMETRIC_SIZES = (2, 4, 8)  # ranks that can sum over symmetric memory
GPU_BLOCK_SIZES = (16, 32, 64, 128)  # that attention on a GPU reads


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How one model copy is split. `all_reduce` says who sums over the tensor-parallel ranks of a GPU.

    auto: by the size of the message, from a table; nccl, symm_mem (torch's operators over symmetric memory) and triton
    (Shoal's kernels over symmetric memory) for every size that they can do. Ranks on CPU have gloo.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    all_reduce: str = "auto"  # one of ALL_REDUCES
    quantized_all_reduce: bool = False  # int8 on the wire for large messages: faster prefill, sums that are rounded

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str = "auto"  # cpu, cuda; auto: cuda where there is one
    num_threads: int | None = None  # torch threads of a CPU shard; auto: all usable cores but one
    enforce_eager: bool = False  # no CUDA graphs: a quicker start, slower steps
    batch_invariant: bool = False  # a sequence's bits do not depend on its batch: fixed tiles and splits, slower
    step_limit_s: float | None = None  # a step that takes less is not stuck (step_watchdog.py); auto: by the device

    def resolve(self, model: ModelFacts, device: str) -> EngineConfig:
        """A copy with every automatic value set, for `device` "cpu" or "cuda".

        `cache.num_blocks` may stay None: a GPU finds it by profiling, and the stages of a pipeline agree on it. Raises
        ConfigError, with the numbers, where the values cannot work together.
        """
        on_cpu = device == "cpu"
        dtype = self.model.dtype
        if dtype == "auto":
            dtype = "float32" if on_cpu else ("bfloat16" if model.dtype == "float32" else model.dtype)
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype {dtype!r} is not supported; use one of {sorted(DTYPE_BYTES)} or auto")
        max_model_len = self.model.max_model_len or model.max_position_embeddings
        if not 1 <= max_model_len <= model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {max_model_len} is outside 1..{model.max_position_embeddings}, the positions that "
                f"{model.architecture} was made for; lower it"
            )
        block_size = self.cache.block_size or (16 if on_cpu else 64)
        if block_size < 1 or block_size & (block_size - 1):
            raise ConfigError(f"block_size {block_size} is not a power of two; use 16, 32 or 64")
        if not on_cpu and block_size not in GPU_BLOCK_SIZES:
            sizes = ", ".join(map(str, GPU_BLOCK_SIZES))
            raise ConfigError(f"block_size {block_size} is none of those of attention on a GPU; use one of {sizes}")
        if self.scheduler.max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {self.scheduler.max_num_seqs}; it must be at least 1")
        num_stages = max(1, self.parallel.pipeline_parallel_size)
        max_steps_in_flight = self.scheduler.max_steps_in_flight
        if max_steps_in_flight is None:
            max_steps_in_flight = 2 * num_stages
        if max_steps_in_flight < num_stages:
            raise ConfigError(
                f"max_steps_in_flight is {max_steps_in_flight}; it must be at least {num_stages}, or a pipeline stage "
                "would always be without work"
            )
        budget = self.scheduler.max_num_batched_tokens or max(2048 if on_cpu else 6144, self.scheduler.max_num_seqs)
        if budget < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens {budget} is below max_num_seqs {self.scheduler.max_num_seqs}: a step could "
                "not decode every sequence; raise the first or lower the second"
            )
        if not self.scheduler.enable_chunked_prefill and budget < max_model_len:
            raise ConfigError(
                f"without chunked prefill a prompt of max_model_len {max_model_len} tokens must fit "
                f"max_num_batched_tokens {budget}; raise it to {max_model_len} or enable chunked prefill"
            )
        if self.step_limit_s is not None and not self.step_limit_s > 0.0:
            raise ConfigError(f"step_limit_s is {self.step_limit_s}; it must be above 0 seconds")
        if not 0.0 < self.cache.gpu_memory_utilization <= 1.0:
            raise ConfigError(f"gpu_memory_utilization {self.cache.gpu_memory_utilization} is outside (0, 1]")
        self._check_split(model, device, dtype)
        cache = self._with_blocks(model, device, dtype, block_size)
        if cache.num_blocks is not None and cache.num_blocks * block_size < max_model_len:
            raise ConfigError(
                f"the KV cache holds {cache.num_blocks} blocks of {block_size} tokens, less than one sequence of "
                f"max_model_len {max_model_len}; give it more memory, or lower max_model_len to "
                f"{cache.num_blocks * block_size}"
            )
        return replace(
            self,
            model=replace(self.model, dtype=dtype, max_model_len=max_model_len),
            cache=cache,
            scheduler=replace(self.scheduler, max_num_batched_tokens=budget, max_steps_in_flight=max_steps_in_flight),
            device=device,
        )

    def _with_blocks(self, model: ModelFacts, device: str, dtype: str, block_size: int) -> CacheConfig:
        """The cache with blocks of that size; how many, as far as it can be told from here."""
        num_blocks, kv_bytes = self.cache.num_blocks, self.cache.kv_cache_memory_bytes
        if num_blocks is None and (device == "cpu" or kv_bytes is not None):
            kv_bytes = kv_bytes if kv_bytes is not None else 1 << 30
            parallel = self.parallel
            per_token = model.kv_bytes_per_token(dtype, parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
            num_blocks = kv_bytes // (per_token * block_size)
        return replace(self.cache, block_size=block_size, num_blocks=num_blocks, kv_cache_memory_bytes=kv_bytes)

    def _check_split(self, model: ModelFacts, device: str, dtype: str) -> None:
        """Raises ConfigError where the model cannot be split as asked, or the collectives are not to be had."""
        parallel = self.parallel
        tp, pp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        if tp < 1 or pp < 1:
            raise ConfigError(f"tensor_parallel_size is {tp} and pipeline_parallel_size {pp}; both must be at least 1")
        if (reason := _why_not_split(model, tp)) is not None:
            usable = [str(size) for size in range(1, model.num_attention_heads + 1) if not _why_not_split(model, size)]
            raise ConfigError(f"tensor_parallel_size {tp} {reason}; this model takes {', '.join(usable[:12])}")
        if pp > model.num_layers:
            raise ConfigError(
                f"pipeline_parallel_size {pp} is above the model's {model.num_layers} layers, and every stage needs "
                f"one; lower it to {model.num_layers} or less"
            )
        self._check_collectives(device, dtype)

    def _check_collectives(self, device: str, dtype: str) -> None:
        """Raises ConfigError where the ranks cannot sum as asked."""
        parallel, tp = self.parallel, self.parallel.tensor_parallel_size
        kind, quantized = parallel.all_reduce, parallel.quantized_all_reduce
        if kind not in ALL_REDUCES:
            raise ConfigError(f"all_reduce {kind!r} is not known; use one of {', '.join(ALL_REDUCES)}")
        if device == "cpu" and (kind != "auto" or quantized):
            asked = "quantized_all_reduce" if kind == "auto" else f"all_reduce {kind!r}"
            raise ConfigError(f"{asked} is for GPUs, and the ranks of this model run on CPU, over gloo; leave it out")
        if tp > 1 and kind == "symm_mem" and dtype == "float16":
            raise ConfigError(
                "all_reduce 'symm_mem' sums float32 and bfloat16, as torch's operators do, and dtype is float16; take "
                "all_reduce auto or triton, or dtype bfloat16"
            )
        if self.batch_invariant and tp > 2 and kind in ("nccl", "symm_mem"):
            raise ConfigError(
                f"all_reduce {kind!r} sums over {tp} ranks in an order that depends on the size of the step, and "
                "batch_invariant asks for one that does not; take all_reduce auto or triton"
            )
        if quantized and self.batch_invariant:
            raise ConfigError(
                "quantized_all_reduce rounds the sums of large steps alone, so that a sequence's bits would depend on "
                "its batch; leave out either it or batch_invariant"
            )
        if quantized and kind in ("nccl", "symm_mem"):
            raise ConfigError(
                f"quantized_all_reduce is done by Shoal's own kernels, and all_reduce {kind!r} leaves every sum to "
                "others; take all_reduce auto or triton, or leave quantized_all_reduce out"
            )
        if tp == 1 or tp in SYMMETRIC_SIZES or device == "cpu":
            return
        wants = [f"all_reduce {kind!r}"] if kind in ("symm_mem", "triton") else []
        wants += ["quantized_all_reduce"] if quantized else []
        wants += ["batch_invariant"] if self.batch_invariant else []
        if wants:
            sizes = ", ".join(map(str, SYMMETRIC_SIZES))
            raise ConfigError(
                f"{wants[0]} sums over symmetric memory, which is for {sizes} ranks, and tensor_parallel_size is {tp}; "
                f"leave {wants[0]} out, or take one of these sizes"
            )


def _why_not_split(model: ModelFacts, tp: int) -> str | None:
    """Why `tp` ranks cannot share every layer of a model evenly; None where they can.

    Heads and intermediate features are split, kv heads split or, where they are fewer than the ranks, repeated. Any
    vocabulary can be split: it is padded.
    """
    if model.num_attention_heads % tp:
        return f"does not divide the model's {model.num_attention_heads} attention heads"
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        return f"neither divides the model's {model.num_kv_heads} kv heads nor is a multiple of them"
    if tp > model.num_kv_heads and model.norms_all_kv_heads:
        return f"is above the model's {model.num_kv_heads} kv heads, all of which share one norm: none can be repeated"
    for size in model.intermediate_sizes:
        if size % tp:
            return f"does not divide the {size} intermediate features of the model's MLP"
    return None
