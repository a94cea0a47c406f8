"""One rank of a model copy: weights, KV blocks and the runner over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from ...kernels.compiling.compile_process import CompileProcess
from ..config import DTYPE_BYTES, EngineConfig, ModelFacts
from ..device import set_cpu_threads
from ..errors import ConfigError
from ..layers.kv_cache import KVCache
from ..models.checkpoint import read_model_facts
from ..models.decoder import DecoderModel
from ..models.loader import load_model
from ..parallel.comm import ParallelContext
from ..plan import RowStart, StepPlan, StepResult
from ..protocol import SamplingParams
from .runner import PendingStep, Runner

logger = logging.getLogger(__name__)

# Steps of up to this many tokens are captured as CUDA graphs. Larger ones keep a GPU busy for longer than the host
# needs to launch them.
_GRAPH_TOKENS = 2048


class Shard:
    """Loads its part of the model and runs plans on it.

    config: resolved. context: this rank's place among those of the model copy; alone if none is given. device: of this
    rank; config's first if none is given. agree: of a number of every rank's, the least, once all have said theirs.
    num_neighbours: ranks that share this machine's cores. Raises ModelError for a checkpoint that cannot be served,
    ConfigError where memory is short. `startup_seconds` says what each stage of that took.
    """

    def __init__(
        self,
        config: EngineConfig,
        context: ParallelContext | None = None,
        device: torch.device | None = None,
        *,
        agree: Callable[[int], int] | None = None,
        num_neighbours: int = 1,
    ) -> None:
        facts = read_model_facts(Path(config.model.path))
        self.startup_seconds: dict[str, float] = {}
        self.device = device or torch.device(config.device)
        available = 0
        if self.device.type == "cpu":
            set_cpu_threads(config.num_threads, num_neighbours)
        else:
            with self._stage("device"):
                self.device = torch.device(self.device.type, self.device.index or 0)
                torch.cuda.set_device(self.device)
                if config.cache.num_blocks is None:
                    available = _available_bytes(self.device, config.cache.gpu_memory_utilization)
        assert config.scheduler.max_num_batched_tokens is not None
        graph_tokens = min(_GRAPH_TOKENS, config.scheduler.max_num_batched_tokens)
        if self.device.type == "cpu":
            model = self._load(config, context, agree)
        else:
            with CompileProcess() as process:  # gets ready while the weights are read
                model = self._load(config, context, agree)
                with self._stage("kernels"):
                    _make_runner(model, config, facts, 1, self.device).compile_kernels(
                        process, graph_tokens, num_neighbours
                    )
        num_blocks, room = config.cache.num_blocks, config.cache.kv_cache_memory_bytes
        if room is not None:  # this stage of a pipeline may have more layers than the configuration took it to have
            found = _blocks_in(room, model, config, facts, "kv_cache_memory_bytes leaves")
            num_blocks = min(found, num_blocks or found)
        elif num_blocks is None:
            with self._stage("memory profile"):
                num_blocks = _profile_blocks(model, config, facts, self.device, available)
        if agree is not None:
            with self._stage("other ranks' blocks"):
                num_blocks = agree(num_blocks)
        self.num_blocks = num_blocks
        with self._stage("KV cache"):
            self._runner = _make_runner(model, config, facts, self.num_blocks, self.device)
        if self.device.type == "cuda" and not config.enforce_eager:
            with self._stage("CUDA graphs"):
                self._runner.capture(graph_tokens)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.startup_seconds.items())
        logger.info("%s is ready on %s with %d KV blocks: %s", config.model.path, self.device, self.num_blocks, stages)

    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue a step; on a CPU it has run when this returns."""
        return self._runner.launch(plan)

    def run(self, plan: StepPlan) -> StepResult:
        """Run a step and wait for its tokens."""
        return self._runner.run(plan)

    def synchronize(self) -> None:
        """Wait until no other rank needs anything more of this one for the steps so far."""
        self._runner.synchronize()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _load(
        self, config: EngineConfig, context: ParallelContext | None, agree: Callable[[int], int] | None
    ) -> DecoderModel:
        with self._stage("weights"):
            model = load_model(config, self.device, context)
        if agree is not None:
            # From here on ranks wait for each other in collectives, and these end after minutes; one rank may read its
            # weights from a cache and another one from a network.
            with self._stage("other ranks' weights"):
                agree(0)
        return model

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.startup_seconds[name] = time.perf_counter() - begin


def _make_runner(
    model: DecoderModel, config: EngineConfig, facts: ModelFacts, num_blocks: int, device: torch.device
) -> Runner:
    assert config.cache.block_size is not None
    kv_cache = KVCache(
        num_layers=model.num_local_layers,
        num_blocks=num_blocks,
        num_kv_heads=model.num_local_kv_heads,
        block_size=config.cache.block_size,
        head_dim=facts.head_dim,
        dtype=getattr(torch, config.model.dtype),
        device=device,
    )
    return Runner(model, kv_cache, config, facts, device)


def _available_bytes(device: torch.device, utilization: float) -> int:
    """What this process may still take of the device. Raises ConfigError where that is less than its share."""
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
    model: DecoderModel, config: EngineConfig, facts: ModelFacts, device: torch.device, available: int
) -> int:
    """KV blocks that fit beside the weights and the largest step, on a CUDA device.

    Runs one step of max_num_batched_tokens tokens and takes what `gpu_memory_utilization` of the device leaves.
    available: bytes that were free before the weights were loaded; what is gone since and torch does not know of,
    CUDA and its libraries hold for this process.
    """
    assert config.cache.block_size is not None
    assert config.model.max_model_len is not None
    assert config.scheduler.max_num_batched_tokens is not None
    block_size = config.cache.block_size
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    # As many sequences as may run, so that the sampler too takes what it may ever take.
    num_seqs = config.scheduler.max_num_seqs
    lens = np.full(num_seqs, config.scheduler.max_num_batched_tokens // num_seqs, np.int32)
    lens = np.minimum(lens, config.model.max_model_len)
    per_seq = -(-int(lens[0]) // block_size)
    num_blocks = num_seqs * per_seq
    runner = _make_runner(model, config, facts, num_blocks, device)
    rows = np.arange(num_seqs, dtype=np.int32)
    runner.run(
        StepPlan(
            step=0,
            rows=rows,
            starts=np.zeros(num_seqs, np.int32),
            num_tokens=lens,
            token_ids=np.zeros(int(lens.sum()), np.int32),
            sample_slices=rows,
            sample_rows=rows,
            table_rows=np.repeat(rows, per_seq),
            table_indices=np.tile(np.arange(per_seq, dtype=np.int32), num_seqs),
            table_blocks=np.arange(num_blocks, dtype=np.int32),
            # Filtered by one row: with tensor parallelism, ranks then share all logits out.
            row_starts=(RowStart(0, 0, 1, SamplingParams(top_p=0.5)),),
        )
    )
    torch.cuda.synchronize(device)
    bytes_per_block = _bytes_per_block(model, config, facts)
    step = torch.cuda.max_memory_allocated(device) - weights - num_blocks * bytes_per_block
    # Graphs have a pool of their own, which the largest of them fills like a step outside of graphs.
    graphs = 0 if config.enforce_eager else step
    free, total = torch.cuda.mem_get_info(device)
    outside = max(0, available - free - torch.cuda.memory_reserved(device))
    room = int(total * config.cache.gpu_memory_utilization) - outside - weights - step - graphs
    taken = f"weights ({weights / 2**30:.1f} GiB) and activations ({(step + graphs) / 2**30:.1f} GiB) leave"
    found = _blocks_in(
        room, model, config, facts, f"gpu_memory_utilization {config.cache.gpu_memory_utilization}, {taken}"
    )
    del runner
    torch.cuda.empty_cache()
    return found


def _blocks_in(room: int, model: DecoderModel, config: EngineConfig, facts: ModelFacts, what: str) -> int:
    """KV blocks of this rank that fit into `room` bytes. Raises ConfigError where no whole sequence would."""
    assert config.cache.block_size is not None
    assert config.model.max_model_len is not None
    found = max(0, room) // _bytes_per_block(model, config, facts)
    if found * config.cache.block_size < config.model.max_model_len:
        raise ConfigError(
            f"{what} {max(room, 0) / 2**30:.1f} GiB for KV blocks: {found * config.cache.block_size} tokens, less than "
            f"one sequence of max_model_len {config.model.max_model_len}; lower max_model_len or "
            "max_num_batched_tokens, or give more memory"
        )
    return found


def _bytes_per_block(model: DecoderModel, config: EngineConfig, facts: ModelFacts) -> int:
    """Of this rank's layers and kv heads together."""
    assert config.cache.block_size is not None
    heads = model.num_local_layers * model.num_local_kv_heads
    return 2 * heads * facts.head_dim * config.cache.block_size * DTYPE_BYTES[config.model.dtype]
