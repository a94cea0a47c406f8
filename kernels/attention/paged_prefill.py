"""Causal attention of several new tokens of a sequence over its blocks of the paged KV cache (prefill, chunks).

    query i of a slice has position p = context_len - Q + i and sees keys j <= p; with a window W, only j > p - W
    o[i, h] = softmax_j( cap(q[i, h] . K[h // G, j] * scale) ) . V[h // G, :]       cap as in paged_decode

Legend as in paged_decode.py, but S slices of Q tokens each; starts [S + 1]: first token of each slice, then
the last's end. The cache already holds a slice's own keys. On a GPU an empty slice is padding.

A token's bits do not depend on slicing or other slices; in torch only with `invariant`.

Paper: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from .paged_decode import check_out
from .tables import PrefillTables


@dataclass(frozen=True, slots=True)
class PrefillSlice:
    """Torch input of a slice: L keys, from the first visible one."""

    rows: torch.Tensor  # int64 [2 * KV * M'], blocks of a cache seen as [B * 2 * KV, BS, D]
    skipped: int  # keys of the first block before all windows
    length: int  # L
    start: int  # of the slice in the step
    query_len: int  # Q
    mask: torch.Tensor | None  # [Q, L], 0 or -inf; None: plain causal, Q = L


def prefill_index(
    starts: Sequence[int],
    context_lens: Sequence[int],
    block_tables: torch.Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    invariant: bool = False,
) -> tuple[PrefillSlice, ...]:
    """One entry per slice, or with `invariant` per token. `starts` [S + 1] and lengths are host integers.

    In torch a GEMM row's summation order depends on its neighbours; a single token over exactly its visible
    keys has the same bits in any step. Raises ValueError where a slice exceeds its context or table.
    """
    if invariant:
        starts, context_lens, block_tables = _one_token_each(starts, context_lens, block_tables)
    heads = torch.arange(2 * num_kv_heads, device=block_tables.device)[:, None]
    slices = []
    for table, (first, end), context_len in zip(block_tables, pairwise(starts), context_lens, strict=True):
        query_len = end - first
        if not 0 < query_len <= context_len <= len(table) * block_size:
            raise ValueError(
                f"a slice of {query_len} tokens with a context of {context_len} and {len(table)} blocks of {block_size}"
            )
        start = 0 if window is None else max(0, context_len - query_len - window + 1)
        first_block, last_block = start // block_size, -(-context_len // block_size)
        rows = (table[first_block:last_block].long() * (2 * num_kv_heads) + heads).flatten()
        length = context_len - start
        mask = None
        if length != query_len or (window is not None and window < query_len):
            mask = _causal_mask(query_len, length, window, dtype, block_tables.device)
        slices.append(PrefillSlice(rows, start - first_block * block_size, length, first, query_len, mask))
    return tuple(slices)


def _one_token_each(
    starts: Sequence[int], context_lens: Sequence[int], block_tables: torch.Tensor
) -> tuple[Sequence[int], Sequence[int], torch.Tensor]:
    query_lens = [end - first for first, end in pairwise(starts)]
    lens = [length - n + i + 1 for n, length in zip(query_lens, context_lens, strict=True) for i in range(n)]
    repeats = torch.tensor(query_lens, device=block_tables.device)
    return range(starts[0], starts[-1] + 1), lens, block_tables.repeat_interleave(repeats, 0)


def _causal_mask(
    query_len: int, length: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[Q, L]: 0 where query i sees key j, else -inf."""
    position = torch.arange(length - query_len, length, device=device)[:, None]
    key = torch.arange(length, device=device)
    unseen = key > position
    if window is not None:
        unseen |= key <= position - window
    return torch.zeros(query_len, length, dtype=dtype, device=device).masked_fill_(unseen, float("-inf"))


def paged_prefill_ref(
    q: torch.Tensor,
    cache: torch.Tensor,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The formula in fp32 per query; result [T, H, D] in q's dtype."""
    block_size, group = cache.shape[3], q.shape[1] // cache.shape[2]
    out = torch.empty_like(q)
    token = 0
    for table, query_len, context_len in zip(block_tables.tolist(), query_lens, context_lens, strict=True):
        slots = [(table[j // block_size], j % block_size) for j in range(context_len)]
        pairs = torch.stack([cache[block, :, :, offset] for block, offset in slots], dim=2).float()
        k, v = pairs.repeat_interleave(group, 1)  # [H, L, D] each
        for position in range(context_len - query_len, context_len):
            seen = slice(0 if window is None else max(0, position - window + 1), position + 1)
            scores = torch.einsum("hd,hld->hl", q[token].float(), k[:, seen]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[token] = torch.einsum("hl,hld->hd", scores.softmax(-1), v[:, seen]).to(q.dtype)
            token += 1
    return out


def paged_prefill(
    q: torch.Tensor,
    cache: torch.Tensor,
    slices: Sequence[PrefillSlice] | PrefillTables,
    *,
    scale: float,
    softcap: float | None = None,
    out: torch.Tensor,
) -> None:
    """Attention of the slices' tokens of q [T, H, D] over the cache [B, 2, KV, BS, D], into `out`.

    Raises ValueError as `paged_decode` does.
    """
    if q.shape[1] % cache.shape[2] or cache.shape[4] != q.shape[2]:
        raise ValueError(f"q has shape {tuple(q.shape)}, the cache {tuple(cache.shape)}")
    check_out(q, out)
    if isinstance(slices, PrefillTables):
        from .paged_prefill_triton import paged_prefill_triton

        paged_prefill_triton(q, cache, slices, scale=scale, softcap=softcap, out=out)
        return
    for entry in slices:
        tokens = slice(entry.start, entry.start + entry.query_len)
        out[tokens] = _attend(q[tokens], *_gather(cache, entry), entry, scale, softcap)


def _gather(cache: torch.Tensor, entry: PrefillSlice) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, num_kv_heads, block_size, head_dim = cache.shape
    gathered = cache.view(-1, block_size, head_dim).index_select(0, entry.rows).view(2, 1, num_kv_heads, -1, head_dim)
    k, v = gathered[..., entry.skipped : entry.skipped + entry.length, :].unbind()
    return k, v


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, entry: PrefillSlice, scale: float, softcap: float | None
) -> torch.Tensor:
    """[Q, H, D] of one slice, q [Q, H, D], k and v [1, KV, L, D]."""
    if softcap is None:
        heads_first = q.transpose(0, 1)[None]
        causal = entry.mask is None
        out = F.scaled_dot_product_attention(
            heads_first, k, v, attn_mask=entry.mask, is_causal=causal, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    num_tokens, num_heads, head_dim = q.shape
    mask = entry.mask
    if mask is None:
        mask = _causal_mask(num_tokens, num_tokens, None, q.dtype, q.device)
    grouped = q.view(num_tokens, k.shape[1], -1, head_dim).permute(1, 2, 0, 3)  # [KV, G, Q, D]
    scores = (grouped @ k[0, :, None].transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap).add_(mask)
    return (scores.softmax(-1) @ v[0, :, None]).permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)


def paged_prefill_cost(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> tuple[int, int]:
    """(bytes, flops)."""
    num_read = num_pairs = 0
    for query_len, context_len in zip(query_lens, context_lens, strict=True):
        reach = context_len if window is None else window
        num_read += min(context_len, query_len - 1 + reach)
        positions = range(context_len - query_len, context_len)
        num_pairs += sum(min(position + 1, reach) for position in positions)
    num_elements = 2 * num_read * num_kv_heads + 2 * sum(query_lens) * num_heads
    return num_elements * head_dim * dtype.itemsize, 4 * num_pairs * num_heads * head_dim
