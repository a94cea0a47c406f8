"""Write the keys and values of a step's tokens to their slots of the paged cache.

    cache[slot // BS, 0, h, slot % BS] = k[t, h]         slot = slot_mapping[t]
    cache[slot // BS, 1, h, slot % BS] = v[t, h]

Legend: T tokens, B blocks, KV kv heads, BS block_size, D head_dim. kv [T, 2 KV, D], keys before values;
cache [B, 2, KV, BS, D]; slot_mapping int64 [T], distinct. On CUDA (kv_store_triton.py) `rope_kv_store`
fuses q/k norm, RoPE and the store. Slot -1, only there, is padding.

Paper: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import numpy as np
import torch

from ..backend import Backend, backend_of
from ..linear.rms_norm import rms_norm
from .rope import RopeIndex, RopeRows, check_rope, rope


def store_rows(slot_mapping: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Input of `kv_store`, equal for all layers.

    Torch: rows int64 [T * 2 KV] of a cache seen as [B * 2 KV * BS, D]. Triton: the slots.
    """
    if backend_of(slot_mapping) is not Backend.TORCH:
        return slot_mapping
    slots = slot_mapping.cpu().numpy()  # torch takes five times as long for a few integers
    blocks, offsets = np.divmod(slots, block_size)
    rows = (blocks[:, None] * (2 * num_kv_heads) + np.arange(2 * num_kv_heads)) * block_size + offsets[:, None]
    return torch.from_numpy(rows.reshape(-1)).to(slot_mapping.device)


def kv_store_ref(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store slot by slot, in place."""
    _, _, num_kv_heads, block_size, _ = cache.shape
    for token, slot in enumerate(slot_mapping.tolist()):
        cache[slot // block_size, 0, :, slot % block_size] = kv[token, :num_kv_heads]
        cache[slot // block_size, 1, :, slot % block_size] = kv[token, num_kv_heads:]


def kv_store(kv: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor) -> None:
    """Write kv [T, 2 KV, D] into the cache [B, 2, KV, BS, D]; `rows` is from `store_rows`."""
    num_tokens, num_heads, head_dim = kv.shape
    if cache.shape[1] * cache.shape[2] != num_heads or cache.shape[4] != head_dim:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, the cache {tuple(cache.shape)}")
    if backend_of(cache) is not Backend.TORCH:
        from .kv_store_triton import kv_store_triton

        kv_store_triton(kv, cache, rows)
        return
    if rows.shape != (num_tokens * num_heads,):
        raise ValueError(f"{tuple(rows.shape)} rows for {num_tokens} tokens of {num_heads} key and value heads")
    cache.view(-1, head_dim).index_copy_(0, rows, kv.reshape(-1, head_dim))


def rope_kv_store(
    qkv: torch.Tensor,
    num_heads: int,
    factors: RopeRows,
    cache: torch.Tensor,
    rows: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """`rope` of qkv's queries and keys [T, H + 2 KV, D] in place, then `kv_store`; num_heads is H.

    q_norm and k_norm [D] apply `rms_norm` per head first. Afterwards qkv's keys are undefined.
    """
    norms = _norm_weights(q_norm, k_norm, qkv.shape[-1])
    num_turned = num_heads + cache.shape[2]
    if not isinstance(factors, RopeIndex):
        if norms is not None:
            for part, weight in zip((qkv[:, :num_heads], qkv[:, num_heads:num_turned]), norms, strict=True):
                part.copy_(rms_norm(part, weight, eps))
        rope(qkv[:, :num_turned], factors)
        kv_store(qkv[:, num_heads:], cache, rows)
        return
    check_rope(qkv, factors)
    if num_turned + cache.shape[2] != qkv.shape[1] or cache.shape[4] != qkv.shape[2]:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)} with {num_heads} query heads, the cache {tuple(cache.shape)}"
        )
    from .kv_store_triton import rope_kv_store_triton

    rope_kv_store_triton(qkv, num_heads, factors.cache, factors.positions, cache, rows, norms, eps)


def _norm_weights(
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if q_norm is None and k_norm is None:
        return None
    if q_norm is None or k_norm is None or q_norm.shape != (head_dim,) or k_norm.shape != (head_dim,):
        shapes = [None if norm is None else tuple(norm.shape) for norm in (q_norm, k_norm)]
        raise ValueError(f"the norms of queries and keys have weights {shapes}; expected two of ({head_dim},)")
    return q_norm, k_norm


def kv_store_cost(num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops)."""
    return num_tokens * (4 * num_kv_heads * head_dim * dtype.itemsize + 8), 0


def rope_kv_store_cost(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, num_rotated: int, dtype: torch.dtype
) -> tuple[int, int]:
    """(bytes, flops)."""
    moved = 2 * (num_heads * num_rotated + 2 * num_kv_heads * head_dim) * dtype.itemsize
    return num_tokens * (moved + 4 * num_rotated + 16), 3 * num_tokens * (num_heads + num_kv_heads) * num_rotated
