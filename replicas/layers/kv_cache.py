"""The paged KV cache of one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.attention.block_copy import block_copy
from ..host_copy import send_ints
from ..kv_cache_spec import KVCacheSpec
from ..plan import BlockCopy


class KVCache:
    """`layers[layer]` has the spec's shape, [num_blocks, 2, num_kv_heads, block_size, head_dim].

    `keys[layer]` and `values[layer]` are views of it, each [num_blocks, num_kv_heads, block_size, head_dim]. Memory is
    zeroed: on CPU the system maps pages at their first write, so a large cache costs nothing until it is used.
    """

    def __init__(self, spec: KVCacheSpec, num_blocks: int, device: torch.device) -> None:
        self.spec, self.num_blocks, self.block_size, self.device = spec, num_blocks, spec.block_size, device
        shape, dtype = spec.layer_shape(num_blocks), getattr(torch, spec.dtype)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
        self.keys = [layer[:, 0] for layer in self.layers]
        self.values = [layer[:, 1] for layer in self.layers]

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks in every layer. All sources are read before any target is written."""
        if not copies:
            return
        source = send_ints([copy.source for copy in copies], self.device)
        target = send_ints([copy.target for copy in copies], self.device)
        for layer in self.layers:
            block_copy(layer, source, target)
