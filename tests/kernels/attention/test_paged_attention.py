"""Paged attention by torch against the formulas, on caches that are NaN wherever nothing was written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.kernels.attention.paged_decode import decode_index, paged_decode, paged_decode_ref
from shoal.kernels.attention.paged_prefill import paged_prefill, paged_prefill_ref, prefill_index
from tests.support.paged_cache import paged_cache, starts_after

HEADS = [(4, 4), (4, 2), (6, 1)]  # query heads, kv heads
SETTINGS = [(None, None), (None, 2.0), (5, None), (1, None), (9, 3.0), (100, None)]  # window, softcap


@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("context_lens", [[1], [16], [37], [8, 8, 8], [3, 41, 16, 1]])
def test_decode(context_lens, heads, kv_heads, window, softcap):
    cache, tables = paged_cache(context_lens, kv_heads, 8, 12)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    fused = torch.randn(len(context_lens), heads + 2, 12)
    q = fused[:, :heads]  # a view, as the fused projection gives it
    settings = {"scale": 0.3, "softcap": softcap}
    index = decode_index(lens, tables, num_kv_heads=kv_heads, block_size=8, head_dim=12, window=window, dtype=q.dtype)
    got = torch.full((len(context_lens), heads, 12), torch.nan)
    paged_decode(q, cache, index, **settings, out=got)
    want = paged_decode_ref(q, cache, lens, tables, window=window, **settings)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decode_in_half_precision(dtype):
    cache, tables = paged_cache([5, 30], 2, 16, 16, dtype)
    lens, q = torch.tensor([5, 30], dtype=torch.int32), torch.randn(2, 4, 16, dtype=dtype)
    index = decode_index(lens, tables, num_kv_heads=2, block_size=16, head_dim=16, window=None, dtype=dtype)
    got = torch.full_like(q, torch.nan)
    paged_decode(q, cache, index, scale=0.25, out=got)
    want = paged_decode_ref(q, cache, lens, tables, scale=0.25)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_decode_reads_no_more_blocks_than_its_window_spans():
    _, tables = paged_cache([100], 1, 4, 8)
    index = decode_index(
        torch.tensor([100]), tables, num_kv_heads=1, block_size=4, head_dim=8, window=6, dtype=torch.float32
    )
    blocks = tables[0, 23:25]  # positions 94..99
    assert index.rows.tolist() == [*(2 * blocks).tolist(), *(2 * blocks + 1).tolist()]


def test_decode_refuses_a_table_that_is_too_short():
    with pytest.raises(ValueError, match="more than 2 blocks"):
        decode_index(
            torch.tensor([17]), torch.zeros(1, 2, dtype=torch.int32), num_kv_heads=1, block_size=8, head_dim=4,
            window=None, dtype=torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(
    ("query_lens", "context_lens"), [([2], [2]), ([17], [17]), ([3], [40]), ([9, 2, 30], [33, 18, 30])]
)
def test_prefill(query_lens, context_lens, heads, kv_heads, window, softcap):
    cache, tables = paged_cache(context_lens, kv_heads, 8, 12)
    q = torch.randn(3 + sum(query_lens), heads + 2, 12)[:, :heads]
    settings = {"scale": 0.3, "softcap": softcap}
    starts = starts_after(3, query_lens)
    slices = prefill_index(
        starts, context_lens, tables, num_kv_heads=kv_heads, block_size=8, window=window, dtype=q.dtype
    )
    got = torch.full((len(q), heads, 12), torch.nan)
    paged_prefill(q, cache, slices, **settings, out=got)
    want = paged_prefill_ref(q[3:], cache, query_lens, context_lens, tables, window=window, **settings)
    torch.testing.assert_close(got[3:], want, rtol=1e-5, atol=1e-5)
    assert got[:3].isnan().all()


def test_prefill_of_a_whole_prompt_is_causal_attention():
    """Against torch's own attention on dense tensors, which knows nothing of blocks."""
    cache, tables = paged_cache([21], 2, 4, 16)
    dense = torch.cat([cache[block] for block in tables[0, :6]], dim=2)[:, :, :21].repeat_interleave(2, 1)
    q = torch.randn(21, 4, 16)
    slices = prefill_index([0, 21], [21], tables, num_kv_heads=2, block_size=4, window=None, dtype=q.dtype)
    want = F.scaled_dot_product_attention(q.transpose(0, 1), *dense, is_causal=True).transpose(0, 1)
    got = torch.full_like(q, torch.nan)
    paged_prefill(q, cache, slices, scale=0.25, out=got)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prefill_refuses_slices_that_do_not_fit():
    tables = torch.zeros(1, 2, dtype=torch.int32)
    options = {"num_kv_heads": 1, "block_size": 8, "window": None, "dtype": torch.float32}
    with pytest.raises(ValueError, match="2 blocks of 8"):
        prefill_index([0, 4], [17], tables, **options)
    with pytest.raises(ValueError, match="a slice of 9 tokens"):
        prefill_index([0, 9], [8], tables, **options)
