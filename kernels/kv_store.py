"""Write the keys and values of a step's tokens to their slots of the paged cache.

    cache[slot // BS, 0, h, slot % BS] = k[t, h]         slot = slot_mapping[t]
    cache[slot // BS, 1, h, slot % BS] = v[t, h]

Legend: T tokens, B blocks, KV kv heads, BS block_size, D head_dim. kv [T, 2 KV, D], a token's keys before its values
as the fused projection gives them; cache [B, 2, KV, BS, D]; slot_mapping int64 [T]. Slots of one step are distinct.

Called by replicas/layers/attention.py. Paper: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import torch


def store_rows(slot_mapping: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Row numbers int64 [T * 2 KV] in a cache seen as [B * 2 KV * BS, D]; equal for all layers, made once a step."""
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    heads = torch.arange(2 * num_kv_heads, device=slot_mapping.device)
    offsets = slot_mapping - blocks * block_size
    return ((blocks[:, None] * (2 * num_kv_heads) + heads) * block_size + offsets[:, None]).flatten()


def kv_store_ref(kv: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Slot by slot, in place."""
    _, _, num_kv_heads, block_size, _ = cache.shape
    for token, slot in enumerate(slot_mapping.tolist()):
        cache[slot // block_size, 0, :, slot % block_size] = kv[token, :num_kv_heads]
        cache[slot // block_size, 1, :, slot % block_size] = kv[token, num_kv_heads:]


def kv_store(kv: torch.Tensor, cache: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes kv [T, 2 KV, D] into the cache [B, 2, KV, BS, D], in place; `rows` is from `store_rows`."""
    num_tokens, num_heads, head_dim = kv.shape
    if rows.shape != (num_tokens * num_heads,):
        raise ValueError(f"{tuple(rows.shape)} rows for {num_tokens} tokens of {num_heads} key and value heads")
    if cache.shape[1] * cache.shape[2] != num_heads or cache.shape[4] != head_dim:
        raise ValueError(f"kv has shape {tuple(kv.shape)}, the cache {tuple(cache.shape)}")
    cache.view(-1, head_dim).index_copy_(0, rows, kv.reshape(-1, head_dim))
