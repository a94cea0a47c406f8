"""One rank of a model copy: weights, KV blocks and the runner over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .checkpoint import read_model_facts
from .config import EngineConfig, ModelFacts
from .device import set_cpu_threads
from .errors import ConfigError
from .kv_cache import KVCache
from .loader import load_model
from .models.decoder import DecoderModel
from .plan import StepPlan, StepResult
from .runner import Runner


class Shard:
    """Loads its part of the model and runs plans on it.

    config: resolved. Raises ModelError for a checkpoint that cannot be served, ConfigError where memory is short.
    """

    def __init__(self, config: EngineConfig) -> None:
        facts = read_model_facts(Path(config.model.path))
        self.device = torch.device(config.device)
        if self.device.type == "cpu":
            set_cpu_threads(config.num_threads)
        model = load_model(config, self.device)
        self.num_blocks = config.cache.num_blocks or _profile_blocks(model, config, facts, self.device)
        self._runner = _make_runner(model, config, facts, self.num_blocks, self.device)

    def run(self, plan: StepPlan) -> StepResult:
        return self._runner.run(plan)


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


def _profile_blocks(model: DecoderModel, config: EngineConfig, facts: ModelFacts, device: torch.device) -> int:
    """KV blocks that fit beside the weights and the largest step, on a CUDA device.

    Runs one step of max_num_batched_tokens tokens and takes what `gpu_memory_utilization` of the device leaves.
    """
    assert config.cache.block_size is not None
    assert config.model.max_model_len is not None
    assert config.scheduler.max_num_batched_tokens is not None
    block_size = config.cache.block_size
    num_tokens = min(config.scheduler.max_num_batched_tokens, config.model.max_model_len)
    num_blocks = -(-num_tokens // block_size)
    torch.cuda.reset_peak_memory_stats(device)
    runner = _make_runner(model, config, facts, num_blocks, device)
    indices = np.arange(num_blocks, dtype=np.int32)
    runner.run(
        StepPlan(
            step=0,
            rows=np.zeros(1, np.int32),
            starts=np.zeros(1, np.int32),
            num_tokens=np.array([num_tokens], np.int32),
            token_ids=np.zeros(num_tokens, np.int32),
            sample_slices=np.zeros(1, np.int32),
            sample_rows=np.zeros(1, np.int32),
            table_rows=np.zeros(num_blocks, np.int32),
            table_indices=indices,
            table_blocks=indices,
        )
    )
    torch.cuda.synchronize(device)
    bytes_per_block = facts.kv_bytes_per_token(config.model.dtype) * block_size
    peak = torch.cuda.max_memory_allocated(device) - num_blocks * bytes_per_block
    free, total = torch.cuda.mem_get_info(device)
    # Memory that others hold on the device, and that CUDA and its libraries hold outside torch's allocator.
    foreign = total - free - torch.cuda.memory_reserved(device)
    room = int(total * config.cache.gpu_memory_utilization) - foreign - peak
    found = room // bytes_per_block
    if found * block_size < config.model.max_model_len:
        raise ConfigError(
            f"after weights and activations ({peak / 2**30:.1f} GiB) {max(room, 0) / 2**30:.1f} GiB are left for KV "
            f"blocks: {max(found, 0) * block_size} tokens, less than one sequence of max_model_len "
            f"{config.model.max_model_len}; lower max_model_len or max_num_batched_tokens, or raise "
            f"gpu_memory_utilization {config.cache.gpu_memory_utilization}"
        )
    del runner
    torch.cuda.empty_cache()
    return found
