"""The engine's configuration: frozen, standard library only.

A user's `EngineConfig` may hold None for "auto". `EngineConfig.resolve(model, device)` is pure and
returns a `ResolvedConfig`, in which every field has a value.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import ConfigError
from .kv_cache_spec import DTYPE_BYTES, KVCacheSpec
from .stages import layer_cost, split_costs

ALL_REDUCES = ("auto", "nccl", "symm_mem", "triton")
SYMMETRIC_SIZES = (2, 4, 8)  # tensor-parallel sizes that symmetric memory supports
GPU_BLOCK_SIZES = (16, 32, 64, 128)  # that GPU attention supports
GROUP_START_TIMEOUT_S = 1800.0  # for the ranks of a replica to start and load the model
_CPU_KV_BYTES = 1 << 30  # of each rank, unless set
_STEP_LIMITS_S = {"cuda": 5.0, "cpu": 60.0}  # on CPU a prefill chunk may take long


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint's properties that the engine needs before loading it."""

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
    intermediate_sizes: tuple[int, ...] = ()  # distinct MLP widths; empty: unknown
    mlp_features: tuple[int, ...] = ()  # of each layer; empty: unknown
    norms_all_kv_heads: bool = False  # K norm spans all kv heads (OLMo 2)

    def kv_cache_spec(self, dtype: str, block_size: int = 1, tp: int = 1, pp: int = 1) -> KVCacheSpec:
        """The cache of the rank with the most layers. More ranks than kv heads replicate heads."""
        return KVCacheSpec(self._most_layers(pp), max(1, self.num_kv_heads // tp), block_size, self.head_dim, dtype)

    def _most_layers(self, num_stages: int) -> int:
        """Layers of the largest pipeline stage; of equal stages if costs are unknown."""
        if num_stages == 1 or not self.mlp_features:
            return -(-self.num_layers // num_stages)
        heads = self.num_attention_heads, self.num_kv_heads, self.head_dim
        costs = [layer_cost(self.hidden_size, *heads, features) for features in self.mlp_features]
        return max(map(len, split_costs(costs, self.vocab_size * self.hidden_size, num_stages)))


@dataclass(frozen=True, slots=True)
class ModelConfig:
    path: str  # a local folder
    dtype: str = "auto"  # float32, float16, bfloat16; auto: float32 on CPU (exact, replayable), else the checkpoint's
    max_model_len: int | None = None  # auto: the checkpoint's max_position_embeddings
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
    max_steps_in_flight: int | None = None  # auto: 2 for each pipeline stage


@dataclass(frozen=True, slots=True)
class ParallelConfig:
    """How one model copy is split. `all_reduce`: the backend of tensor-parallel GPU ranks.

    auto: by message size. nccl, symm_mem (torch's operators over symmetric memory) or triton
    (Shoal's kernels over it): for every size that the backend supports. CPU ranks use gloo.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    all_reduce: str = "auto"  # one of ALL_REDUCES
    quantized_all_reduce: bool = False  # large messages as int8: faster prefill, rounded sums

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True)
class FixedBlocks:
    """The user gave the number of KV blocks."""

    num_blocks: int


@dataclass(frozen=True, slots=True)
class BlocksInMemory:
    """The KV blocks that fit `memory_bytes` of each rank, at most `num_blocks`."""

    memory_bytes: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class ProfiledBlocks:
    """The KV blocks that a GPU measures to fit beside weights and activations."""

    gpu_memory_utilization: float


KVBlocks = FixedBlocks | BlocksInMemory | ProfiledBlocks


@dataclass(frozen=True, slots=True)
class ResolvedModelConfig:
    path: str
    dtype: str  # one of DTYPE_BYTES
    max_model_len: int
    load_format: str
    seed: int


@dataclass(frozen=True, slots=True)
class ResolvedCacheConfig:
    """`blocks`: how a rank finds its number of KV blocks. The ranks agree on the least."""

    block_size: int
    enable_prefix_caching: bool
    blocks: KVBlocks


@dataclass(frozen=True, slots=True)
class ResolvedSchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_chunked_prefill: bool
    max_steps_in_flight: int


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """An EngineConfig with every automatic value set, for one model and one device."""

    model: ResolvedModelConfig
    cache: ResolvedCacheConfig
    scheduler: ResolvedSchedulerConfig
    parallel: ParallelConfig
    device: str  # cpu, cuda
    num_threads: int  # torch threads of a CPU shard; 0: the rank's share of its own machine's cores
    enforce_eager: bool
    batch_invariant: bool
    step_limit_s: float


@dataclass(frozen=True, slots=True)
class EngineConfig:
    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: str = "auto"  # cpu, cuda; auto: cuda if available
    num_threads: int | None = None  # torch threads of a CPU shard; auto: all usable cores but one
    enforce_eager: bool = False  # no CUDA graphs: a quicker start, slower steps
    batch_invariant: bool = False  # a sequence's bits do not depend on its batch; slower
    step_limit_s: float | None = None  # shorter steps never count as stuck (step_watchdog.py); auto: by the device

    def resolve(self, model: ModelFacts, device: str) -> ResolvedConfig:
        """Set every automatic value, for `device` "cpu" or "cuda".

        Raises ConfigError, with the numbers, if values contradict each other.
        """
        resolved_model = _resolve_model(self.model, model, device)
        max_model_len = resolved_model.max_model_len
        block_size = _resolve_block_size(self.cache, device)
        scheduler = _resolve_scheduler(self.scheduler, self.parallel, max_model_len, device)
        if self.step_limit_s is not None and not self.step_limit_s > 0.0:
            raise ConfigError(f"step_limit_s is {self.step_limit_s}; it must be above 0 seconds")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads is {self.num_threads}; it must be at least 1")
        _check_split(self.parallel, model)
        _check_collectives(self.parallel, device, resolved_model.dtype, batch_invariant=self.batch_invariant)
        tp, pp = self.parallel.tensor_parallel_size, self.parallel.pipeline_parallel_size
        kv_cache = model.kv_cache_spec(resolved_model.dtype, block_size, tp, pp)
        return ResolvedConfig(
            model=resolved_model,
            cache=_resolve_cache(self.cache, kv_cache, max_model_len, device),
            scheduler=scheduler,
            parallel=self.parallel,
            device=device,
            num_threads=self.num_threads or 0,
            enforce_eager=self.enforce_eager,
            batch_invariant=self.batch_invariant,
            step_limit_s=self.step_limit_s or _STEP_LIMITS_S[device],
        )


def _resolve_model(config: ModelConfig, model: ModelFacts, device: str) -> ResolvedModelConfig:
    dtype = config.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"
    elif dtype == "auto":
        dtype = "bfloat16" if model.dtype == "float32" else model.dtype
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not supported; use one of {sorted(DTYPE_BYTES)} or auto")
    max_model_len = config.max_model_len or model.max_position_embeddings
    if not 1 <= max_model_len <= model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len {max_model_len} is outside 1..{model.max_position_embeddings}, the positions that "
            f"{model.architecture} was made for; lower it"
        )
    return ResolvedModelConfig(config.path, dtype, max_model_len, config.load_format, config.seed)


def _resolve_block_size(config: CacheConfig, device: str) -> int:
    block_size = config.block_size or (16 if device == "cpu" else 64)
    if block_size < 1 or block_size & (block_size - 1):
        raise ConfigError(f"block_size {block_size} is not a power of two; use 16, 32 or 64")
    if device != "cpu" and block_size not in GPU_BLOCK_SIZES:
        sizes = ", ".join(map(str, GPU_BLOCK_SIZES))
        raise ConfigError(f"block_size {block_size} is not supported by GPU attention; use one of {sizes}")
    return block_size


def _resolve_scheduler(
    config: SchedulerConfig, parallel: ParallelConfig, max_model_len: int, device: str
) -> ResolvedSchedulerConfig:
    if config.max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs is {config.max_num_seqs}; it must be at least 1")
    num_stages = max(1, parallel.pipeline_parallel_size)
    in_flight = 2 * num_stages if config.max_steps_in_flight is None else config.max_steps_in_flight
    if in_flight < num_stages:
        raise ConfigError(
            f"max_steps_in_flight is {in_flight}; it must be at least {num_stages}, or a pipeline stage would always "
            "be idle"
        )
    budget = config.max_num_batched_tokens or max(2048 if device == "cpu" else 6144, config.max_num_seqs)
    if budget < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens {budget} is below max_num_seqs {config.max_num_seqs}: a step could not decode "
            "every sequence; raise the first or lower the second"
        )
    if not config.enable_chunked_prefill and budget < max_model_len:
        raise ConfigError(
            f"without chunked prefill a prompt of max_model_len {max_model_len} tokens must fit "
            f"max_num_batched_tokens {budget}; raise it to {max_model_len} or enable chunked prefill"
        )
    return ResolvedSchedulerConfig(config.max_num_seqs, budget, config.enable_chunked_prefill, in_flight)


def _resolve_cache(config: CacheConfig, kv_cache: KVCacheSpec, max_model_len: int, device: str) -> ResolvedCacheConfig:
    """kv_cache: of the rank with the most layers."""
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise ConfigError(f"gpu_memory_utilization {config.gpu_memory_utilization} is outside (0, 1]")
    block_size = kv_cache.block_size
    memory = config.kv_cache_memory_bytes
    if memory is None and config.num_blocks is None and device == "cpu":
        memory = _CPU_KV_BYTES
    num_blocks = config.num_blocks
    if num_blocks is None and memory is not None:
        num_blocks = memory // kv_cache.bytes_per_block
    if num_blocks is not None and num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"the KV cache holds {num_blocks} blocks of {block_size} tokens, less than one sequence of max_model_len "
            f"{max_model_len}; give it more memory, or lower max_model_len to {num_blocks * block_size}"
        )
    blocks: KVBlocks
    if num_blocks is None:
        blocks = ProfiledBlocks(config.gpu_memory_utilization)
    elif memory is None:
        blocks = FixedBlocks(num_blocks)
    else:
        blocks = BlocksInMemory(memory, num_blocks)
    return ResolvedCacheConfig(block_size, config.enable_prefix_caching, blocks)


def _check_split(parallel: ParallelConfig, model: ModelFacts) -> None:
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


def _why_not_split(model: ModelFacts, tp: int) -> str | None:
    """Why `tp` ranks cannot share every layer evenly; None if they can. Vocabularies are padded."""
    if model.num_attention_heads % tp:
        return f"does not divide the model's {model.num_attention_heads} attention heads"
    if model.num_kv_heads % tp and tp % model.num_kv_heads:
        return f"neither divides the model's {model.num_kv_heads} kv heads nor is a multiple of them"
    if tp > model.num_kv_heads and model.norms_all_kv_heads:
        return f"is above the model's {model.num_kv_heads} kv heads, and one norm spans them all: none can be repeated"
    for size in model.intermediate_sizes:
        if size % tp:
            return f"does not divide the {size} intermediate features of the model's MLP"
    return None


def _check_collectives(parallel: ParallelConfig, device: str, dtype: str, *, batch_invariant: bool) -> None:
    tp, kind, quantized = parallel.tensor_parallel_size, parallel.all_reduce, parallel.quantized_all_reduce
    if kind not in ALL_REDUCES:
        raise ConfigError(f"all_reduce {kind!r} is not known; use one of {', '.join(ALL_REDUCES)}")
    if device == "cpu":
        if kind != "auto" or quantized:
            asked = "quantized_all_reduce" if kind == "auto" else f"all_reduce {kind!r}"
            raise ConfigError(f"{asked} is for GPUs, and the ranks of this model run on CPU, over gloo; leave it out")
        return
    if tp > 1 and kind == "symm_mem" and dtype == "float16":
        raise ConfigError(
            "all_reduce 'symm_mem' sums float32 and bfloat16, as torch's operators do, and dtype is float16; take "
            "all_reduce auto or triton, or dtype bfloat16"
        )
    if batch_invariant and tp > 2 and kind in ("nccl", "symm_mem"):
        raise ConfigError(
            f"all_reduce {kind!r} sums over {tp} ranks in an order that depends on the size of the step, and "
            "batch_invariant asks for one that does not; take all_reduce auto or triton"
        )
    _check_quantized_all_reduce(parallel, batch_invariant=batch_invariant)
    if tp > 1 and tp not in SYMMETRIC_SIZES:
        _check_symmetric_size(parallel, batch_invariant=batch_invariant)


def _check_quantized_all_reduce(parallel: ParallelConfig, *, batch_invariant: bool) -> None:
    if parallel.quantized_all_reduce and batch_invariant:
        raise ConfigError(
            "quantized_all_reduce rounds the sums of large steps alone, so that a sequence's bits would depend on "
            "its batch; leave out either it or batch_invariant"
        )
    if parallel.quantized_all_reduce and parallel.all_reduce in ("nccl", "symm_mem"):
        raise ConfigError(
            f"quantized_all_reduce is done by Shoal's own kernels, and all_reduce {parallel.all_reduce!r} leaves every "
            "sum to others; take all_reduce auto or triton, or leave quantized_all_reduce out"
        )


def _check_symmetric_size(parallel: ParallelConfig, *, batch_invariant: bool) -> None:
    """Raise ConfigError if an option needs symmetric memory, which does not support this number of ranks."""
    kind = parallel.all_reduce
    wants = [f"all_reduce {kind!r}"] if kind in ("symm_mem", "triton") else []
    wants += ["quantized_all_reduce"] if parallel.quantized_all_reduce else []
    wants += ["batch_invariant"] if batch_invariant else []
    if wants:
        sizes = ", ".join(map(str, SYMMETRIC_SIZES))
        raise ConfigError(
            f"{wants[0]} sums over symmetric memory, which is for {sizes} ranks, and tensor_parallel_size is "
            f"{parallel.tensor_parallel_size}; leave {wants[0]} out, or take one of these sizes"
        )
