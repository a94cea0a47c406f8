"""Paged attention by Triton: one body on the interpreter and on CUDA, caches that are NaN wherever nothing was written.

The torch path has its own wider tests in test_paged_attention.py; here it runs the same cases, for comparison's sake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from shoal.kernels.attention.paged_decode import (
    DecodeIndex,
    decode_index,
    decode_tables,
    paged_decode,
    paged_decode_cost,
    paged_decode_ref,
)
from shoal.kernels.attention.paged_prefill import (
    PrefillSlice,
    paged_prefill,
    paged_prefill_cost,
    paged_prefill_ref,
    prefill_index,
)
from shoal.kernels.attention.tables import DecodeTables, PrefillTables
from shoal.kernels.backend import Backend, backend_of
from tests.support.paged_cache import paged_cache, starts_after

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
BLOCK_SIZE = 16


def decode_operand(
    lens: torch.Tensor, tables: torch.Tensor, cache: torch.Tensor, window: int | None, splits: tuple[int, int] | None
) -> DecodeIndex | DecodeTables:
    """What paged_decode reads on the backend of `lens`; `splits` are num_splits and min_blocks, where it matters."""
    _, _, kv_heads, block_size, head_dim = cache.shape
    shape = {"num_kv_heads": kv_heads, "block_size": block_size}
    if backend_of(lens) is Backend.TORCH:
        return decode_index(lens, tables, head_dim=head_dim, window=window, dtype=cache.dtype, **shape)
    made = decode_tables(lens, tables, window=window, **shape)
    return made if splits is None else replace(made, num_splits=splits[0], min_blocks=splits[1])


def check_decode(
    device, context_lens, *, heads=4, kv_heads=2, head_dim=32, block_size=BLOCK_SIZE, dtype=torch.float32,
    window=None, softcap=None, splits=None,
) -> None:  # fmt: skip
    num_unseen = () if window is None else [max(0, length - window) for length in context_lens]
    cache, tables = paged_cache(context_lens, kv_heads, block_size, head_dim, dtype, num_unseen=num_unseen)
    fused = torch.randn(len(context_lens) + 2, heads + 2, head_dim, dtype=dtype)  # two tokens of another slice follow
    q = fused.to(device)[:, :heads]  # a view, as the fused projection gives it
    cache, tables = cache.to(device), tables.to(device)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    settings = {"scale": 0.3, "softcap": softcap}
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=device)
    paged_decode(q, cache, decode_operand(lens, tables, cache, window, splits), **settings, out=out)
    want = paged_decode_ref(q[:-2], cache, lens, tables, window=window, **settings)
    torch.testing.assert_close(out[:-2], want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out[-2:].isnan().all()


def check_prefill(
    device, query_lens, context_lens, *, heads=4, kv_heads=2, head_dim=32, block_size=BLOCK_SIZE,
    dtype=torch.float32, window=None, softcap=None,
) -> None:  # fmt: skip
    num_unseen = ()
    if window is not None:
        num_unseen = [max(0, m - n - window + 1) for n, m in zip(query_lens, context_lens, strict=True)]
    cache, tables = paged_cache(context_lens, kv_heads, block_size, head_dim, dtype, num_unseen=num_unseen)
    starts = starts_after(3, query_lens)
    fused = torch.randn(starts[-1] + 1, heads + 2, head_dim, dtype=dtype)
    q, cache, tables = fused.to(device)[:, :heads], cache.to(device), tables.to(device)
    slices: tuple[PrefillSlice, ...] | PrefillTables
    if backend_of(q) is Backend.TORCH:
        slices = prefill_index(
            starts, context_lens, tables, num_kv_heads=kv_heads, block_size=block_size, window=window, dtype=dtype
        )
    else:
        starts_and_lens = (torch.tensor(values, dtype=torch.int32, device=device) for values in (starts, context_lens))
        slices = PrefillTables(*starts_and_lens, tables, window)
    settings = {"scale": 0.3, "softcap": softcap}
    out = torch.full(q.shape, torch.nan, dtype=dtype, device=device)
    paged_prefill(q, cache, slices, **settings, out=out)
    want = paged_prefill_ref(q[3:-1], cache, query_lens, context_lens, tables, window=window, **settings)
    torch.testing.assert_close(out[3:-1], want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert out[:3].isnan().all()
    assert out[-1].isnan().all()


@pytest.mark.parametrize("splits", [None, (3, 1), (2, 2)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (1, 2.0), (40, None), (None, 3.0)])
def test_decode_of_contexts_around_a_block_by_windows_caps_and_splits(device, window, softcap, splits):
    context_lens = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 4 * BLOCK_SIZE + 3]
    check_decode(device, context_lens, heads=2, kv_heads=1, window=window, softcap=softcap, splits=splits)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1), (8, 1), (6, 2), (7, 1), (20, 1)])
def test_decode_by_query_heads_of_a_kv_head(device, heads, kv_heads):
    check_decode(device, [35, 7], heads=heads, kv_heads=kv_heads, splits=(2, 1))


@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(8, 16), (12, 64), (32, 128), (64, 32), (96, 16), (128, 64), (256, 64), (256, 128)]
)
def test_decode_by_head_dim_and_block_size(device, head_dim, block_size):
    check_decode(device, [block_size + 3], head_dim=head_dim, block_size=block_size, dtype=torch.float16)


def test_decode_over_more_splits_than_are_joined_at_a_time(device):
    check_decode(device, [19 * BLOCK_SIZE - 5, 3], heads=2, kv_heads=1, splits=(20, 1))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_decode_in_half_precision(device, dtype):
    check_decode(device, [5, 90], dtype=dtype, head_dim=64, window=70, splits=(3, 1))


def test_decode_of_a_padding_sequence_writes_nothing(device):
    """A CUDA graph runs with more sequences than there are; those beyond have a context of 0 and a table of zeros."""
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        pytest.skip("torch prepares its index from the sequences that are there")
    cache = torch.full((2, 2, 1, BLOCK_SIZE, 32), torch.nan, device=device)
    lens, tables = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((2,), (2, 4)))
    for splits in ((1, 4), (4, 1)):
        operand = decode_operand(lens, tables, cache, None, splits)
        out = torch.full((2, 2, 32), 7.0, device=device)
        paged_decode(torch.ones(2, 2, 32, device=device), cache, operand, scale=0.2, out=out)
        assert (out == 7).all()


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (1, 2.0), (20, None), (70, 3.0)])
@pytest.mark.parametrize(
    ("query_lens", "context_lens"), [([2], [2]), ([17], [17]), ([3], [60]), ([9, 2, 20], [73, 18, 20])]
)
def test_prefill_by_windows_and_caps(device, query_lens, context_lens, window, softcap):
    check_prefill(device, query_lens, context_lens, heads=2, kv_heads=1, window=window, softcap=softcap)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1), (8, 1), (6, 2), (7, 1), (40, 1)])
def test_prefill_by_query_heads_of_a_kv_head(device, heads, kv_heads):
    check_prefill(device, [11, 7], [38, 7], heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(8, 16), (12, 64), (32, 128), (64, 32), (96, 16), (128, 64), (256, 64), (256, 128)]
)
def test_prefill_by_head_dim_and_block_size(device, head_dim, block_size):
    check_prefill(device, [9], [block_size + 6], head_dim=head_dim, block_size=block_size, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_prefill_in_half_precision_over_several_tiles(device, dtype):
    check_prefill(device, [150, 2], [160, 40], heads=2, kv_heads=1, dtype=dtype, window=90)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_token_is_the_same_bits_in_any_slice_of_any_step(device, dtype, window, softcap):
    """A sequence of 70 tokens in one slice, in chunks, and token by token, each beside other slices.

    numpy's GEMMs, which the interpreter uses, depend on a row's place in its tile of eight tokens: there
    the sequence is cut at tiles.
    """
    heads, kv_heads, head_dim, length = 4, 2, 32, 70
    cache, tables = (each.to(device) for each in paged_cache([50, length, 9], kv_heads, BLOCK_SIZE, head_dim, dtype))
    q = torch.randn(length, heads, head_dim, dtype=dtype, device=device)
    interpreted = backend_of(q) is Backend.INTERPRET

    def attend(query_lens: list[int], context_lens: list[int], rows: list[int]) -> torch.Tensor:
        """The part of sequence 1, which is all q but for as many tokens as stand beside it."""
        starts, sequence = starts_after(2, query_lens), rows.index(1)
        tokens = slice(starts[sequence], starts[sequence + 1])
        all_q = torch.randn(starts[-1], heads, head_dim, dtype=dtype, device=device)
        all_q[tokens] = q[context_lens[sequence] - query_lens[sequence] : context_lens[sequence]]
        slices: Sequence[PrefillSlice] | PrefillTables
        if backend_of(q) is Backend.TORCH:
            slices = prefill_index(
                starts, context_lens, tables[rows], num_kv_heads=kv_heads, block_size=BLOCK_SIZE, window=window,
                dtype=q.dtype, invariant=True,
            )  # fmt: skip
        else:
            on_device = (torch.tensor(each, dtype=torch.int32, device=device) for each in (starts, context_lens))
            slices = PrefillTables(*on_device, tables[rows], window)
        out = torch.empty_like(all_q)
        paged_prefill(all_q, cache, slices, scale=0.3, softcap=softcap, out=out)
        return out[tokens]

    cuts = ((32, 32), (16, 48), (22, 70)) if interpreted else ((33, 33), (30, 63), (7, 70))
    whole = attend([length], [length], [1])
    chunks = [attend([3, n, 9], [50, end, 9], [0, 1, 2]) for n, end in cuts]
    assert torch.equal(torch.cat(chunks), whole)
    for end in (1, 17, 33, 65) if interpreted else (1, 16, 17, 32, 65, 70):
        assert torch.equal(attend([1, 1], [end, 2], [1, 2]), whole[end - 1 : end])


def test_prefill_of_padding_writes_nothing(device):
    """A CUDA graph has room for slices that are not there: of no tokens, or of one token and no context."""
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        pytest.skip("torch prepares its index from the slices that are there")
    cache = torch.full((2, 2, 1, BLOCK_SIZE, 32), torch.nan, device=device)
    lens, tables = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((3,), (3, 4)))
    for starts in ([1, 1, 1, 1], [0, 1, 2, 3]):
        slices = PrefillTables(torch.tensor(starts, dtype=torch.int32, device=device), lens, tables, None)
        out = torch.full((4, 2, 32), 7.0, device=device)
        paged_prefill(torch.ones(4, 2, 32, device=device), cache, slices, scale=0.2, out=out)
        assert (out == 7).all()


@pytest.mark.gpu
def test_a_cuda_graph_follows_its_context_lengths():
    """Capture fails wherever the host waits for the device; a replay sees lengths that were written after it."""
    longest, now, device = [90, 130, 40], [17, 130, 1], torch.device("cuda")
    cache, tables = (tensor.to(device) for tensor in paged_cache(longest, 2, BLOCK_SIZE, 64))
    query_lens = [1, 20, 1]
    q = torch.randn(3 + sum(query_lens), 4, 64, device=device)
    lens = torch.tensor(longest, dtype=torch.int32, device=device)
    starts = torch.tensor(starts_after(3, query_lens), dtype=torch.int32, device=device)
    out = torch.empty_like(q)
    settings = {"scale": 0.3, "softcap": None}

    def attend() -> None:
        paged_decode(q, cache, decode_operand(lens, tables, cache, None, (4, 1)), **settings, out=out)
        paged_prefill(q, cache, PrefillTables(starts, lens, tables, None), **settings, out=out)

    attend()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    lens.copy_(torch.tensor(now, dtype=torch.int32))
    graph.replay()
    decoded = paged_decode_ref(q[:3], cache, lens, tables, **settings)
    prefilled = paged_prefill_ref(q[3:], cache, query_lens, now, tables, **settings)
    torch.testing.assert_close(out, torch.cat((decoded, prefilled)), rtol=2e-5, atol=2e-5)


def test_kernels_refuse_a_block_size_that_they_cannot_tile(device):
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        pytest.skip("torch takes any block_size")
    with pytest.raises(ValueError, match="block_size 8: attention on a GPU needs 16, 32, 64 or 128"):
        check_decode(device, [5], block_size=8)
    with pytest.raises(ValueError, match="block_size 8: attention on a GPU needs 16, 32, 64 or 128"):
        check_prefill(device, [5], [5], block_size=8)
    with pytest.raises(ValueError, match="use a smaller block_size"):
        check_decode(device, [5], head_dim=256, block_size=128)


def test_splits_fill_the_machine_and_no_more():
    def splits(
        num_seqs: int, num_blocks: int, window: int | None = None, num_expected: int | None = None
    ) -> tuple[int, int]:
        lens, tables = torch.zeros(num_seqs, dtype=torch.int32), torch.zeros(num_seqs, num_blocks, dtype=torch.int32)
        made = decode_tables(lens, tables, num_kv_heads=8, block_size=64, window=window, num_expected=num_expected)
        return made.num_splits, made.min_blocks

    assert splits(1, 4) == (4, 1)  # 64 tokens each
    assert splits(1, 2048) == (16, 1)  # 128 programs over 8 kv heads
    assert splits(8, 128) == (2, 1)
    assert splits(32, 128) == (3, 32)  # 768 programs over 256, where contexts exceed 2048 tokens
    assert splits(256, 16) == (1, 32)
    assert splits(256, 2048) == (16, 32)  # 8192 tokens each
    assert splits(1, 2048, window=512) == (8, 1)
    assert splits(16, 256) == (2, 1)
    assert splits(16, 256, num_expected=2) == (8, 1)


def test_costs():
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "dtype": torch.bfloat16}
    assert paged_decode_cost([10, 3], **shape) == ((2 * 13 * 2 + 2 * 2 * 4) * 16, 4 * 13 * 4 * 8)
    assert paged_decode_cost([10, 3], window=5, **shape) == ((2 * 8 * 2 + 2 * 2 * 4) * 16, 4 * 8 * 4 * 8)
    # Queries at positions 2 and 3 see 3 and 4 keys; with a window of 2, two each of the keys 1, 2 and 3.
    assert paged_prefill_cost([2], [4], **shape) == ((2 * 4 * 2 + 2 * 2 * 4) * 16, 4 * 7 * 4 * 8)
    assert paged_prefill_cost([2], [4], window=2, **shape) == ((2 * 3 * 2 + 2 * 2 * 4) * 16, 4 * 4 * 4 * 8)
