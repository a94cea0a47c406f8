"""One rank of a model copy: weights, KV blocks and the runner over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from ...kernels.compiling.compile_process import CompileProcess
from ..config import BlocksInMemory, FixedBlocks, ModelFacts, ProfiledBlocks, ResolvedConfig
from ..device import set_cpu_threads
from ..errors import ConfigError
from ..layers.kv_cache import KVCache
from ..models.checkpoint import read_model_facts
from ..models.decoder import DecoderModel
from ..models.loader import load_model
from ..parallel.comm import ParallelContext
from ..plan import RowStart, StepPlan, StepResult
from ..protocol import SamplingParams
from .pending_step import PendingStep
from .runner import Runner
from .warmup import capture_graphs, compile_kernels

logger = logging.getLogger(__name__)

# Steps of up to this many tokens are captured. Larger ones take the GPU longer than the host's
# launches.
_GRAPH_TOKENS = 2048


class Shard:
    """Loads its part of the model and runs plans on it.

    context: default the only rank. agree: minimum over ranks, once every rank has called it.
    num_neighbours: ranks sharing this machine's cores. `startup_seconds`: by stage. Raises
    ModelError for an unusable checkpoint, ConfigError if memory is short.
    """

    def __init__(
        self,
        config: ResolvedConfig,
        context: ParallelContext | None = None,
        device: torch.device | None = None,
        *,
        agree: Callable[[int], int] | None = None,
        num_neighbours: int = 1,
    ) -> None:
        self._config, self._facts = config, read_model_facts(Path(config.model.path))
        self._agree, self._num_neighbours = agree, num_neighbours
        self.startup_seconds: dict[str, float] = {}
        self.device = device or torch.device(config.device)
        free_bytes = self._open_device()
        on_gpu = self.device.type == "cuda"
        # The process starts while the weights are read.
        with CompileProcess() if on_gpu else nullcontext() as process:
            model = self._load(context)
            if process is not None:
                self._compile_kernels(model, process)
        self.num_blocks = self._find_blocks(model, free_bytes)
        with self._stage("KV cache"):
            self._runner = _make_runner(model, config, self._facts, self.num_blocks, self.device)
        if on_gpu and not config.enforce_eager:
            with self._stage("CUDA graphs"):
                capture_graphs(self._runner, self._graph_tokens)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.startup_seconds.items())
        logger.info("%s is ready on %s with %d KV blocks: %s", config.model.path, self.device, self.num_blocks, stages)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step; on a CPU it has run when this returns."""
        return self._runner.launch(plan)

    def run(self, plan: StepPlan) -> StepResult:
        return self._runner.run(plan)

    def synchronize(self) -> None:
        """Wait until no other rank needs data of the steps so far."""
        self._runner.synchronize()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def _graph_tokens(self) -> int:
        return min(_GRAPH_TOKENS, self._config.scheduler.max_num_batched_tokens)

    def _open_device(self) -> int:
        """Set up CPU threads or the GPU; return a GPU's free bytes if profiled, else 0."""
        if self.device.type == "cpu":
            set_cpu_threads(self._config.num_threads or None, self._num_neighbours)
            return 0
        with self._stage("device"):
            self.device = torch.device(self.device.type, self.device.index or 0)
            torch.cuda.set_device(self.device)
            blocks = self._config.cache.blocks
            return _free_bytes(self.device, blocks.gpu_memory_utilization) if isinstance(blocks, ProfiledBlocks) else 0

    def _load(self, context: ParallelContext | None) -> DecoderModel:
        with self._stage("weights"):
            model = load_model(self._config, self.device, context)
        if self._agree is not None:
            # From here on ranks wait in collectives, which time out after minutes. Weights may come
            # from a cache on one rank and from a network on another.
            with self._stage("other ranks' weights"):
                self._agree(0)
        return model

    def _compile_kernels(self, model: DecoderModel, process: CompileProcess) -> None:
        with self._stage("kernels"):
            runner = _make_runner(model, self._config, self._facts, 1, self.device)
            compile_kernels(runner, process, self._graph_tokens, self._num_neighbours)

    def _find_blocks(self, model: DecoderModel, free_bytes: int) -> int:
        """KV blocks of every rank. free_bytes: before loading, if profiled."""
        blocks = self._config.cache.blocks
        match blocks:
            case FixedBlocks():
                num_blocks = blocks.num_blocks
            case BlocksInMemory():  # resolve() estimated the stage with the most layers, perhaps another
                found = _blocks_in(blocks.memory_bytes, model, self._config, "kv_cache_memory_bytes leaves")
                num_blocks = min(found, blocks.num_blocks)
            case ProfiledBlocks():
                with self._stage("memory profile"):
                    utilization = blocks.gpu_memory_utilization
                    num_blocks = _profile_blocks(model, self._config, self._facts, self.device, utilization, free_bytes)
        if self._agree is None:
            return num_blocks
        with self._stage("other ranks' blocks"):
            return self._agree(num_blocks)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.startup_seconds[name] = time.perf_counter() - begin


def _make_runner(
    model: DecoderModel, config: ResolvedConfig, facts: ModelFacts, num_blocks: int, device: torch.device
) -> Runner:
    kv_cache = KVCache(model.kv_cache_spec(config.cache.block_size), num_blocks, device)
    return Runner(model, kv_cache, config, facts, device)


def _free_bytes(device: torch.device, utilization: float) -> int:
    """Bytes this process may allocate. Raises ConfigError if below its share."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if free < int(total * utilization):
        raise ConfigError(
            f"gpu_memory_utilization {utilization} asks for {total * utilization / 2**30:.1f} GiB of {device}, where "
            f"{free / 2**30:.1f} GiB are free: other processes hold the rest; lower it to "
            f"{int(free / total * 100) / 100} or stop them"
        )
    return free


def _profile_blocks(
    model: DecoderModel,
    config: ResolvedConfig,
    facts: ModelFacts,
    device: torch.device,
    utilization: float,
    free_before: int,
) -> int:
    """KV blocks that `utilization` of a CUDA device leaves beside weights and the largest step.

    free_before: free bytes before loading. Memory lost outside torch belongs to CUDA and its
    libraries.
    """
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    plan = _largest_plan(config)
    num_blocks = len(plan.table_blocks)
    runner = _make_runner(model, config, facts, num_blocks, device)
    runner.run(plan)
    torch.cuda.synchronize(device)
    kv_bytes = num_blocks * runner.kv_cache.spec.bytes_per_block
    step = torch.cuda.max_memory_allocated(device) - weights - kv_bytes
    # Graphs have their own memory pool, which the largest graph fills like an eager step.
    graphs = 0 if config.enforce_eager else step
    free, total = torch.cuda.mem_get_info(device)
    outside = max(0, free_before - free - torch.cuda.memory_reserved(device))
    free_bytes = int(total * utilization) - outside - weights - step - graphs
    taken = f"weights ({weights / 2**30:.1f} GiB) and activations ({(step + graphs) / 2**30:.1f} GiB) leave"
    found = _blocks_in(free_bytes, model, config, f"gpu_memory_utilization {utilization}, {taken}")
    del runner
    torch.cuda.empty_cache()
    return found


def _largest_plan(config: ResolvedConfig) -> StepPlan:
    num_seqs, block_size = config.scheduler.max_num_seqs, config.cache.block_size
    lens = np.full(num_seqs, config.scheduler.max_num_batched_tokens // num_seqs, np.int32)
    lens = np.minimum(lens, config.model.max_model_len)
    per_seq = -(-int(lens[0]) // block_size)
    rows = np.arange(num_seqs, dtype=np.int32)
    return StepPlan(
        step=0,
        rows=rows,
        starts=np.zeros(num_seqs, np.int32),
        num_tokens=lens,
        token_ids=np.zeros(int(lens.sum()), np.int32),
        sample_slices=rows,
        sample_rows=rows,
        table_rows=np.repeat(rows, per_seq),
        table_indices=np.tile(np.arange(per_seq, dtype=np.int32), num_seqs),
        table_blocks=np.arange(num_seqs * per_seq, dtype=np.int32),
        # One filtered row: with tensor parallelism, ranks then exchange all logits.
        row_starts=(RowStart(0, 0, 1, SamplingParams(top_p=0.5)),),
    )


def _blocks_in(free_bytes: int, model: DecoderModel, config: ResolvedConfig, what: str) -> int:
    """KV blocks that fit `free_bytes`. Raises ConfigError if less than one sequence fits."""
    block_size, max_model_len = config.cache.block_size, config.model.max_model_len
    free_bytes = max(0, free_bytes)
    found = free_bytes // model.kv_cache_spec(block_size).bytes_per_block
    if found * block_size < max_model_len:
        raise ConfigError(
            f"{what} {free_bytes / 2**30:.1f} GiB for KV blocks: {found * block_size} tokens, less than one sequence "
            f"of max_model_len {max_model_len}; lower max_model_len or max_num_batched_tokens, or give more memory"
        )
    return found
