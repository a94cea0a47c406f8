"""Write the keys and values of a step's tokens to their slots of the paged cache.

    keys[slot // BS, h, slot % BS] = k[t, h]         slot = slot_mapping[t]; values likewise

Legend: T tokens, B blocks, KV kv heads, BS block_size, D head_dim. k, v [T, KV, D]; keys, values [B, KV, BS, D];
slot_mapping int64 [T]. Slots of one step are distinct.

Called by replicas/layers/attention.py. Paper: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import torch


def store_rows(slot_mapping: torch.Tensor, num_kv_heads: int, block_size: int) -> torch.Tensor:
    """Row numbers int64 [T * KV] in a cache seen as [B * KV * BS, D]; equal for all layers, so made once a step."""
    blocks = torch.div(slot_mapping, block_size, rounding_mode="floor")
    heads = torch.arange(num_kv_heads, device=slot_mapping.device)
    offsets = slot_mapping - blocks * block_size
    return ((blocks[:, None] * num_kv_heads + heads) * block_size + offsets[:, None]).flatten()


def kv_store_ref(
    k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Slot by slot, in place."""
    block_size = keys.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        keys[slot // block_size, :, slot % block_size] = k[token]
        values[slot // block_size, :, slot % block_size] = v[token]


def kv_store(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> None:
    """Writes k and v [T, KV, D] into the caches [B, KV, BS, D], in place; `rows` is from `store_rows`."""
    num_rows, head_dim = k.shape[0] * k.shape[1], k.shape[2]
    if rows.shape != (num_rows,):
        raise ValueError(f"{tuple(rows.shape)} rows for {k.shape[0]} tokens of {k.shape[1]} kv heads")
    if keys.shape != values.shape or keys.shape[1] != k.shape[1] or keys.shape[3] != head_dim:
        raise ValueError(f"k has shape {tuple(k.shape)}, the cache {tuple(keys.shape)}")
    keys.view(-1, head_dim).index_copy_(0, rows, k.reshape(num_rows, head_dim))
    values.view(-1, head_dim).index_copy_(0, rows, v.reshape(num_rows, head_dim))
