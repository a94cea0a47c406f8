"""The KV cache of one rank as numbers. Standard library only, for configuration."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Layers and kv heads are those of the rank."""

    num_layers: int
    num_kv_heads: int
    block_size: int  # tokens
    head_dim: int
    dtype: str  # one of DTYPE_BYTES

    def layer_shape(self, num_blocks: int) -> tuple[int, int, int, int, int]:
        """[num_blocks, 2, num_kv_heads, block_size, head_dim] of one layer; axis 1 holds keys (0) and values (1)."""
        return num_blocks, 2, self.num_kv_heads, self.block_size, self.head_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        return self.bytes_per_token * self.block_size
