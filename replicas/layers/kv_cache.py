"""The paged KV cache of one rank: a tensor of keys and values per layer, and block copies across them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.attention.block_copy import block_copy
from ..host_copy import send_ints
from ..plan import BlockCopy


class KVCache:
    """`layers[layer]` [num_blocks, 2, num_kv_heads, block_size, head_dim], a block's keys (0) beside its values (1).

    `keys[layer]` and `values[layer]` are views of it, each [num_blocks, num_kv_heads, block_size, head_dim]. Layers and
    kv heads are those of this rank. Memory is zeroed: on CPU the system hands out pages as they are first written, so
    a large cache costs nothing until it is used.
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
        shape = (num_blocks, 2, num_kv_heads, block_size, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.keys = [layer[:, 0] for layer in self.layers]
        self.values = [layer[:, 1] for layer in self.layers]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole blocks in every layer, all sources read before any target is written."""
        if not copies:
            return
        source = send_ints([copy.source for copy in copies], self.device)
        target = send_ints([copy.target for copy in copies], self.device)
        for layer in self.layers:
            block_copy(layer, source, target)
