"""The paged KV cache of one rank: a keys and a values tensor per layer, and block copies across them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.block_copy import block_copy
from .plan import BlockCopy


class KVCache:
    """`keys[layer]` and `values[layer]`, each [num_blocks, num_kv_heads, block_size, head_dim].

    Layers and kv heads are those of this rank. Memory is zeroed: on CPU the system hands out pages as they are first
    written, so a large cache costs nothing until it is used.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole blocks in every layer, all sources read before any target is written."""
        if not copies:
            return
        source = torch.tensor([copy.source for copy in copies], dtype=torch.int64, device=self.device)
        target = torch.tensor([copy.target for copy in copies], dtype=torch.int64, device=self.device)
        for cache in (*self.keys, *self.values):
            block_copy(cache, source, target)
