"""A paged KV cache for tests of attention: scattered blocks, NaN wherever no token was written."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def paged_cache(
    context_lens: Sequence[int],
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    num_unseen: Sequence[int] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache [B, 2, KV, BS, D] with shuffled blocks, and its tables int32 [S, M], one column wider than needed.

    NaN stands in every slot beyond the contexts, block 0 included, and in the first num_unseen slots of each sequence.
    """
    torch.manual_seed(1)
    counts = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(counts) + 3
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    cache = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(context_lens), max(counts) + 1, dtype=torch.int32)
    for s, (length, count) in enumerate(zip(context_lens, counts, strict=True)):
        for i in range(count):
            block = free.pop()
            tables[s, i] = block
            filled = min(block_size, length - i * block_size)
            cache[block, :, :, :filled] = torch.randn(2, num_kv_heads, filled, head_dim).to(dtype)
    for table, num_positions in zip(tables.tolist(), num_unseen):  # noqa: B905 - none given, none poisoned
        for position in range(num_positions):
            cache[table[position // block_size], :, :, position % block_size] = torch.nan
    return cache, tables


def starts_after(num_before: int, query_lens: Sequence[int]) -> list[int]:
    """Where slices begin in a step, and where the last ends, when num_before tokens stand before them."""
    return [num_before, *(num_before + sum(query_lens[: i + 1]) for i in range(len(query_lens)))]
