"""Attention of one query token per sequence over its blocks of the paged KV cache (decode).

    o[s, h] = softmax_j( cap(q[s, h] . K[s, h // G, j] * scale) ) . V[s, h // G, :]       j = 0 .. context_len[s] - 1
    cap(x) = softcap * tanh(x / softcap) if softcap; with a window W only j >= context_len[s] - W

Legend: T tokens, S sequences, H query heads, KV kv heads, G = H / KV; B blocks, BS block_size, D head_dim,
M blocks of a table. q, out [T, H, D], token s of sequence s, other tokens untouched; cache [B, 2, KV, BS,
D], keys at 0, values at 1; context_lens int32 [S], this token included, 0: padding on a GPU; block_tables
int32 [S, M].

Torch gathers keys and values with one index_select into [2, S * KV, L, D]; G heads are rows of one GEMM.

Paper: Kwon et al., PagedAttention, 2023, arXiv:2309.06180.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .tables import DecodeTables

# Programs on an H200 (132 SMs). Few sequences: one per SM, as joins cost more than they save. Many: two
# waves of three per SM.
_FEW_PROGRAMS, _MANY_PROGRAMS = 132, 768
_MAX_SPLITS = 32  # each 16 add one memory wait to the join
# Minimum tokens of a split, for few sequences and for many.
_SHORT_SPLIT, _MEDIUM_SPLIT = 64, 2048
_LONG_SPLIT = 8192  # so that no single program runs on after the others


@dataclass(frozen=True, slots=True)
class DecodeIndex:
    """Torch input of a step for one window; L is the longest (windowed) context."""

    num_seqs: int  # S
    rows: torch.Tensor  # int64 [2 * S * KV * M], blocks of a cache seen as [B * 2 * KV, BS, D]
    length: int  # L, at most M * BS
    mask: torch.Tensor  # 0 or -inf, [S * KV, 1, L], or [1, 1, 1] without masking
    hidden: torch.Tensor | None  # int64 [n], masked rows of [2 * S * KV * M * BS, D]
    # Gather buffer [2 * S * KV * M, BS, D] of all layers. One per layer costs more than the copy: 68 us
    # against 20 for 512 KiB on CPU (page faults, cold cache).
    workspace: torch.Tensor


def decode_tables(
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    window: int | None,
    num_expected: int | None = None,
) -> DecodeTables:
    """Build one step's tables from shapes alone, without a device sync.

    Small batches are split until every SM has work, large ones only where one context may be much longer
    than others. `num_expected`: sequences that are not padding; None: all S.
    """
    num_seqs, num_columns = block_tables.shape
    longest = num_columns * block_size if window is None else min(window, num_columns * block_size)
    num_pairs = (num_expected or num_seqs) * num_kv_heads
    if num_pairs <= _FEW_PROGRAMS:
        wanted, shortest = min(_FEW_PROGRAMS // num_pairs, _MAX_SPLITS), max(_SHORT_SPLIT, block_size)
    else:
        wanted, shortest = -(-_MANY_PROGRAMS // num_pairs), _MEDIUM_SPLIT
    num_splits = min(max(wanted, -(-longest // _LONG_SPLIT)), -(-longest // shortest))
    arrivals = torch.zeros(num_seqs, num_kv_heads, dtype=torch.int32, device=context_lens.device)
    return DecodeTables(context_lens, block_tables, window, num_splits, max(1, shortest // block_size), arrivals)


def decode_index(
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    window: int | None,
    dtype: torch.dtype,
) -> DecodeIndex:
    """Build the index of one step. Raises ValueError where the tables are too short for the contexts.

    numpy: some fifteen operations on a few integers, each 3 to 10 us in torch.
    """
    device = context_lens.device
    lens, tables = context_lens.cpu().numpy().astype(np.int64), block_tables.cpu().numpy()
    longest = int(lens.max())
    if longest > tables.shape[1] * block_size:
        raise ValueError(f"a context of {longest} tokens needs more than {tables.shape[1]} blocks of its table")
    starts = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0)
    first_blocks = starts // block_size
    spans = lens - first_blocks * block_size
    span = int(spans.max())
    num_columns = -(-span // block_size)
    columns = np.minimum(first_blocks[:, None] + np.arange(num_columns), tables.shape[1] - 1)
    blocks = np.take_along_axis(tables, columns, axis=1).astype(np.int64) * (2 * num_kv_heads)
    rows = torch.from_numpy((blocks[:, None, :] + _head_offsets(num_kv_heads)).reshape(-1)).to(device)
    workspace = torch.empty(len(rows), block_size, head_dim, dtype=dtype, device=device)
    positions = np.arange(num_columns * block_size)
    skipped = starts - first_blocks * block_size
    unseen = (positions >= spans[:, None]) | (positions < skipped[:, None])  # [S, M * BS]
    if not unseen[:, :span].any():
        return DecodeIndex(len(lens), rows, span, torch.zeros(1, 1, 1, dtype=dtype, device=device), None, workspace)
    per_head = np.repeat(unseen, num_kv_heads, axis=0)
    mask = torch.zeros(len(per_head), 1, span, dtype=dtype, device=device)
    mask.masked_fill_(torch.from_numpy(per_head[:, None, :span]).to(device), float("-inf"))
    hidden = np.flatnonzero(np.broadcast_to(per_head, (2, *per_head.shape)))
    return DecodeIndex(len(lens), rows, span, mask, torch.from_numpy(hidden).to(device), workspace)


def _head_offsets(num_kv_heads: int) -> np.ndarray:
    """[2, 1, KV, 1]: of keys, then values."""
    return np.arange(2 * num_kv_heads).reshape(2, 1, num_kv_heads, 1)


def paged_decode_ref(
    q: torch.Tensor,
    cache: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """The formula in fp32 per sequence; result [S, H, D] in q's dtype."""
    block_size, group = cache.shape[3], q.shape[1] // cache.shape[2]
    out = torch.empty_like(q)
    for s, context_len in enumerate(context_lens.tolist()):
        first = 0 if window is None else max(0, context_len - window)
        slots = [(int(block_tables[s, j // block_size]), j % block_size) for j in range(first, context_len)]
        k, v = torch.stack([cache[block, :, :, offset] for block, offset in slots], dim=2).float()  # [KV, L, D] each
        scores = torch.einsum("hd,hld->hl", q[s].float(), k.repeat_interleave(group, 0)) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[s] = torch.einsum("hl,hld->hd", scores.softmax(-1), v.repeat_interleave(group, 0)).to(q.dtype)
    return out


def paged_decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    index: DecodeIndex | DecodeTables,
    *,
    scale: float,
    softcap: float | None = None,
    out: torch.Tensor,
) -> None:
    """Decode attention of tokens 0 .. S - 1 of q [T, H, D] over the cache [B, 2, KV, BS, D], into `out`.

    Raises ValueError for mismatched shapes; Triton also for a block_size not 16, 32, 64 or 128.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, num_seqs = cache.shape[2], index.num_seqs
    if num_heads % num_kv_heads or cache.shape[4] != head_dim or num_seqs > len(q):
        raise ValueError(f"q has shape {tuple(q.shape)}, the cache {tuple(cache.shape)}, sequences: {num_seqs}")
    check_out(q, out)
    if isinstance(index, DecodeTables):
        from .paged_decode_triton import paged_decode_triton

        paged_decode_triton(q, cache, index, scale=scale, softcap=softcap, out=out)
        return
    k, v = _gather(cache, index, num_seqs * num_kv_heads)
    # Half the time of scaled_dot_product_attention: 31 us against 68 (8 sequences of 128 tokens, 8 heads on
    # 4, two cores).
    packed = q[:num_seqs].reshape(num_seqs * num_kv_heads, -1, head_dim)
    if softcap is None:
        scores = torch.baddbmm(index.mask, packed, k.transpose(1, 2), alpha=scale)
    else:
        scores = torch.bmm(packed, k.transpose(1, 2)).mul_(scale / softcap).tanh_().mul_(softcap).add_(index.mask)
    probs = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    torch.bmm(probs, v, out=out[:num_seqs].view(packed.shape))


def check_out(q: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ValueError unless `out` fits the attention of q."""
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, of shape {tuple(q.shape)} and {q.dtype}; it is {tuple(out.shape)}, {out.dtype}"
        )


def _gather(cache: torch.Tensor, index: DecodeIndex, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[S * KV, L, D] each in the workspace, zero where masked: unwritten slots may hold NaN; 0 * NaN is NaN."""
    block_size, head_dim = cache.shape[3], cache.shape[4]
    gathered = torch.index_select(cache.view(-1, block_size, head_dim), 0, index.rows, out=index.workspace)
    if index.hidden is not None:
        gathered.view(-1, head_dim).index_fill_(0, index.hidden, 0.0)
    k, v = gathered.view(2, num_pairs, -1, head_dim)[:, :, : index.length].unbind()
    return k, v


def paged_decode_cost(
    context_lens: Sequence[int],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None = None,
) -> tuple[int, int]:
    """(bytes, flops)."""
    num_seen = sum(context_lens) if window is None else sum(min(length, window) for length in context_lens)
    num_elements = 2 * num_seen * num_kv_heads + 2 * len(context_lens) * num_heads
    return num_elements * head_dim * dtype.itemsize, 4 * num_seen * num_heads * head_dim
