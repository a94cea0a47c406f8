"""Attention over a paged cache, beside FlashAttention-3 on the same blocks and torch on contiguous
keys.

FlashAttention-3 comes from an installed vLLM. B sequences, Q new tokens each, ctx context.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.attention.paged_decode import paged_decode, paged_decode_cost
from ...kernels.attention.paged_prefill import paged_prefill, paged_prefill_cost
from ...replicas.kv_cache_spec import KVCacheSpec
from ...replicas.layers.attention import AttentionStep
from ...replicas.layers.batch import AttentionMetadata
from .kernel_cases import Built, Case, Sizes
from .timing import Thunk

_PREFILL_TOKENS = 8192  # of a step, at most
# Torch's attention needs the [Q, ctx] mask of a chunk, which is not comparable above this size.
_MASKED_QUERIES = 4096


def attention_cases(sizes: Sizes, batches: Sequence[int], contexts: Sequence[int]) -> Iterator[Case]:
    """Decode at every batch and context; prefill of whole prompts, and of a last chunk where they are long."""
    shape: dict[str, Any] = {
        "num_heads": sizes.num_heads,
        "num_kv_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "dtype": sizes.dtype,
    }
    for context in contexts:
        for batch in batches:
            cost = paged_decode_cost([context] * batch, **shape)
            yield Case("paged_decode", f"B={batch} ctx={context}", cost, _decode(sizes, batch, context))
    for context in contexts:
        for batch in dict.fromkeys((1, max(1, _PREFILL_TOKENS // context))):
            cost = paged_prefill_cost([context] * batch, [context] * batch, **shape)
            yield Case("paged_prefill", f"B={batch} Q={context}", cost, _prefill(sizes, batch, context, context))
        chunk = context // 4
        if chunk > 1:
            cost = paged_prefill_cost([chunk], [context], **shape)
            yield Case("paged_prefill", f"B=1 Q={chunk} ctx={context}", cost, _prefill(sizes, 1, chunk, context))


@cache
def flash_attention() -> Callable[..., torch.Tensor] | None:
    """FlashAttention-3 of an installed vLLM, if it runs on this device."""
    try:
        found: Any = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    except ImportError:
        return None
    return found.flash_attn_varlen_func if found.is_fa_version_supported(3) else None


def _cache_and_tables(sizes: Sizes, batch: int, context: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A random cache, and block tables in random order."""
    per_sequence = -(-context // sizes.block_size)
    num_blocks = batch * per_sequence
    shape = (num_blocks, 2, sizes.num_kv_heads, sizes.block_size, sizes.head_dim)
    blocks = torch.randperm(num_blocks, device=device).to(torch.int32).view(batch, per_sequence)
    return torch.randn(shape, device=device, dtype=sizes.dtype), blocks


def _step(sizes: Sizes, metadata: AttentionMetadata) -> AttentionStep:
    dtype = str(sizes.dtype).removeprefix("torch.")
    kv_cache = KVCacheSpec(1, sizes.num_kv_heads, sizes.block_size, sizes.head_dim, dtype)
    return AttentionStep.make(metadata, {}, [None], kv_cache, dtype=sizes.dtype)


def _metadata(query_len: int, batch: int, context: int, tables: torch.Tensor) -> AttentionMetadata:
    """Metadata of decode slices (one token each) or of prefill slices."""
    device = tables.device
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * query_len
    none = torch.empty(0, dtype=torch.int32, device=device)
    decodes = query_len == 1
    return AttentionMetadata(
        slot_mapping=torch.zeros(batch * query_len, dtype=torch.int64, device=device),
        decode_lens=lens if decodes else none,
        decode_tables=tables if decodes else tables[:0],
        prefill_starts=starts[:1] if decodes else starts,
        prefill_lens=none if decodes else lens,
        prefill_tables=tables[:0] if decodes else tables,
    )


def _decode(sizes: Sizes, batch: int, context: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        kv, tables = _cache_and_tables(sizes, batch, context, device)
        q = torch.randn(batch, sizes.num_heads, sizes.head_dim, device=device, dtype=dtype)
        out, scale = torch.empty_like(q), sizes.head_dim**-0.5
        index = _step(sizes, _metadata(1, batch, context, tables)).decode[None]
        peers = _flash_peers(q, kv, tables, 1, context)
        return Built(lambda: paged_decode(q, kv, index, scale=scale, out=out), peers)

    return build


def _prefill(sizes: Sizes, batch: int, query_len: int, context: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        kv, tables = _cache_and_tables(sizes, batch, context, device)
        q = torch.randn(batch * query_len, sizes.num_heads, sizes.head_dim, device=device, dtype=dtype)
        out, scale = torch.empty_like(q), sizes.head_dim**-0.5
        parts = _step(sizes, _metadata(query_len, batch, context, tables)).prefill[None]
        peers = _flash_peers(q, kv, tables, query_len, context)
        if query_len == context <= _MASKED_QUERIES:
            peers["SDPA"] = _contiguous_peer(sizes, batch, query_len, device, dtype)

        def ours() -> None:
            for part in parts:
                paged_prefill(q, kv, part, scale=scale, out=out)

        return Built(ours, peers)

    return build


def _flash_peers(
    q: torch.Tensor, kv: torch.Tensor, tables: torch.Tensor, query_len: int, context: int
) -> dict[str, Thunk]:
    """FlashAttention-3 on blocks of the same size; its cache is [blocks, block_size, heads, head_dim]."""
    flash = flash_attention() if q.is_cuda else None
    if flash is None:
        return {}
    keys, values = (kv[:, part].transpose(1, 2).contiguous() for part in (0, 1))
    batch = len(tables)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * query_len
    lens = torch.full((batch,), context, dtype=torch.int32, device=q.device)
    out = torch.empty_like(q)
    return {
        "FA3": lambda: flash(
            q,
            keys,
            values,
            max_seqlen_q=query_len,
            cu_seqlens_q=starts,
            max_seqlen_k=context,
            seqused_k=lens,
            block_table=tables,
            causal=True,
            out=out,
            fa_version=3,
        )
    }


def _contiguous_peer(sizes: Sizes, batch: int, query_len: int, device: str, dtype: torch.dtype) -> Thunk:
    q, k, v = (
        torch.randn(batch, heads, query_len, sizes.head_dim, device=device, dtype=dtype)
        for heads in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)
    )
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
