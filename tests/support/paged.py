"""Run a decoder on its paged cache without an engine: block tables are given out in a scattered order."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.quant.methods.linear_method import MethodFor
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ResolvedConfig
from shoal.replicas.layers.batch import AttentionMetadata
from shoal.replicas.layers.kv_cache import KVCache
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.models.loader import DecoderModel, load_model
from shoal.replicas.parallel.comm import ParallelContext

BLOCK_SIZE = 8
BLOCKS_PER_SEQUENCE = 12
CPU = torch.device("cpu")


def engine_config(folder: Path, device: torch.device = CPU, **model: object) -> ResolvedConfig:
    """A resolved configuration for the checkpoint in `folder`; in fp32 if no dtype is given."""
    cache = CacheConfig(block_size=BLOCK_SIZE, num_blocks=512)
    settings = ModelConfig(str(folder), **({"dtype": "float32"} | model))  # pyright: ignore[reportArgumentType]
    return EngineConfig(settings, cache).resolve(read_model_facts(folder), device.type)


class PagedModel:
    """A rank's model with room for `num_sequences`; `run` takes one step of slices (sequence, token ids)."""

    def __init__(
        self,
        folder: Path,
        num_sequences: int = 2,
        comm: ParallelContext | None = None,
        *,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        method_for: MethodFor | None = None,
    ) -> None:
        config = engine_config(folder, device, dtype=str(dtype).removeprefix("torch."))
        self.device = device
        self.model: DecoderModel = load_model(config, device, comm, method_for)
        num_blocks = num_sequences * BLOCKS_PER_SEQUENCE + 1
        self.cache = KVCache(self.model.kv_cache_spec(BLOCK_SIZE), num_blocks, device)
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)) + 1
        self.tables = order.view(num_sequences, BLOCKS_PER_SEQUENCE).to(torch.int32)
        self.lengths = [0] * num_sequences

    def run(self, slices: list[tuple[int, list[int]]], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states [T, hidden] of the slices' tokens. Slices of one token must come first, as in a plan."""
        rows = [row for row, _ in slices]
        query_lens = [len(tokens) for _, tokens in slices]
        starts = [self.lengths[row] for row in rows]
        positions = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, query_lens, strict=True)])
        owners = torch.repeat_interleave(torch.tensor(rows), torch.tensor(query_lens))
        blocks = self.tables[owners, positions // BLOCK_SIZE].long()
        lens = torch.tensor([start + n for start, n in zip(starts, query_lens, strict=True)], dtype=torch.int32)
        single = sum(n == 1 for n in query_lens)
        metadata = AttentionMetadata(
            slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
            decode_lens=lens[:single],
            decode_tables=self.tables[rows[:single]],
            prefill_starts=torch.tensor([single, *query_lens[single:]]).cumsum(0).to(torch.int32),
            prefill_lens=lens[single:],
            prefill_tables=self.tables[rows[single:]],
        )
        for row, n in zip(rows, query_lens, strict=True):
            self.lengths[row] += n
        input_ids = torch.tensor([token for _, tokens in slices for token in tokens])
        metadata = AttentionMetadata(*(getattr(metadata, name).to(self.device) for name in metadata.__slots__))
        return self.model(input_ids.to(self.device), positions.to(self.device), metadata, self.cache, hidden)

    def logits(self, slices: list[tuple[int, list[int]]]) -> torch.Tensor:
        """float32 [T, vocab] of every token of the slices."""
        logits = self.model.compute_logits(self.run(slices))
        assert self.model.lm_head is not None
        return self.model.lm_head.slice.whole(logits)
