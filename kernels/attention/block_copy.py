"""Copy whole KV blocks for copy-on-write: cache[target[i]] = cache[source[i]].

Legend: B blocks, C copies. cache [B, ...]; source, target int64 [C]. All sources are read before any write.
On CUDA: block_copy_triton.py for up to 16 copies; more use a buffer, as on CPU.
"""

from __future__ import annotations

import torch

from ..backend import Backend, backend_of


def block_copy_ref(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a copied cache; the input is unchanged."""
    result = cache.clone()
    for from_block, to_block in zip(source.tolist(), target.tolist(), strict=True):
        result[to_block] = cache[from_block]
    return result


def block_copy(cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy in place. Raises ValueError unless source and target are vectors of one length."""
    if source.shape != target.shape or source.dim() != 1:
        raise ValueError(f"source {tuple(source.shape)} and target {tuple(target.shape)} must be equal vectors")
    if backend_of(cache) is not Backend.TORCH:
        from .block_copy_triton import MAX_COPIES, block_copy_triton

        if source.numel() <= MAX_COPIES:
            block_copy_triton(cache, source, target)
            return
    cache.index_copy_(0, target, cache.index_select(0, source))


def block_copy_cost(num_copies: int, block_numel: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): each block is read and written once."""
    return 2 * num_copies * block_numel * dtype.itemsize, 0
