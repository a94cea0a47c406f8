"""Copy whole KV blocks, for copy-on-write: cache[target[i]] = cache[source[i]].

Legend: B blocks, C copies. cache [B, ...]; source, target int64 [C]. Sources are read before any target is written.
Called by replicas/kv_cache.py, for each layer, before a step runs.
"""

from __future__ import annotations

import torch


def block_copy_ref(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A copied cache, the input left as it is."""
    result = cache.clone()
    for from_block, to_block in zip(source.tolist(), target.tolist(), strict=True):
        result[to_block] = cache[from_block]
    return result


def block_copy(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copies in place. Raises ValueError where source and target do not pair up."""
    if source.shape != target.shape or source.dim() != 1:
        raise ValueError(f"source {tuple(source.shape)} and target {tuple(target.shape)} must be equal vectors")
    cache.index_copy_(0, target, cache.index_select(0, source))
