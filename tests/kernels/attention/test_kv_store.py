"""Writes to the paged cache, and copies of its blocks, on caches that are NaN wherever nothing was written."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.attention.block_copy import block_copy, block_copy_cost, block_copy_ref
from shoal.kernels.attention.kv_store import (
    kv_store,
    kv_store_cost,
    kv_store_ref,
    rope_kv_store,
    rope_kv_store_cost,
    store_rows,
)
from shoal.kernels.attention.rope import rope_ref, rope_rows
from shoal.kernels.backend import Backend, backend_of
from shoal.kernels.linear.rms_norm import rms_norm_ref
from tests.support.rope import rope_cache

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(2)


def _slots(num_tokens: int, num_blocks: int, block_size: int, device: torch.device) -> torch.Tensor:
    return torch.randperm(num_blocks * block_size)[:num_tokens].to(device)


@pytest.mark.parametrize(("kv_heads", "block_size", "head_dim"), [(1, 1, 6), (2, 16, 6), (3, 8, 6), (5, 4, 130)])
def test_kv_store(kv_heads, block_size, head_dim, dtype, device):
    slots = _slots(min(11, 5 * block_size), 5, block_size, device)
    fused = torch.randn(len(slots), 2 * kv_heads + 1, head_dim, device=device).to(dtype)
    kv = fused[:, 1:]  # a view, as the fused projection gives it
    cache = torch.full((5, 2, kv_heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)
    want = cache.clone()
    kv_store_ref(kv, want, slots)
    kv_store(kv, cache, store_rows(slots, kv_heads, block_size))
    torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 1), (7, 7)])
@pytest.mark.parametrize(("num_rotated", "head_dim"), [(8, 8), (6, 13), (96, 96), (32, 80)])
def test_rope_and_store_in_one(heads, kv_heads, num_rotated, head_dim, normed, dtype, device):
    """Queries stay in the projection, rotated; rotated keys and untouched values stand in the cache."""
    block_size = 4
    factors = rope_cache(40, num_rotated).to(device)
    positions = torch.tensor([39, 0, 5], device=device)
    slots = _slots(3, 5, block_size, device)
    qkv = torch.randn(3, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    cache = torch.full((5, 2, kv_heads, block_size, head_dim), torch.nan, dtype=dtype, device=device)
    norms = (0.5 + torch.rand(2, head_dim, device=device)).to(dtype).unbind() if normed else (None, None)
    q, k = qkv[:, :heads], qkv[:, heads : heads + kv_heads]
    if normed:
        q, k = (rms_norm_ref(x.float(), weight, 1e-5) for x, weight in zip((q, k), norms, strict=True))
    turned = rope_ref(torch.cat((q, k), dim=1), factors, positions).to(dtype)
    want = cache.clone()
    kv_store_ref(torch.cat((turned[:, heads:], qkv[:, heads + kv_heads :]), dim=1), want, slots)
    rows = store_rows(slots, kv_heads, block_size)
    turning = rope_rows(factors, positions, dtype)
    rope_kv_store(qkv, heads, turning, cache, rows, q_norm=norms[0], k_norm=norms[1], eps=1e-5)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype], "equal_nan": True}
    torch.testing.assert_close(cache, want, **tolerance)
    torch.testing.assert_close(qkv[:, :heads], turned[:, :heads], **tolerance)
    assert torch.equal(cache[:, 1].isnan(), want[:, 1].isnan())
    values = ~want[:, 1].isnan()
    assert torch.equal(cache[:, 1][values], want[:, 1][values])


@pytest.mark.parametrize("normed", [False, True])
def test_padding_is_not_stored(normed, device):
    """A slot of -1: neither the block before the first nor any other is written, and its neighbours are."""
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        pytest.skip("a step on torch has no padding")
    slots, positions = torch.tensor([5, -1, 2, -1], device=device), torch.tensor([3, 0, 7, 0], device=device)
    memory = torch.full((3, 2, 2, 4, 8), torch.nan, device=device)
    cache, qkv = memory[1:], torch.randn(4, 7, 8, device=device)
    real, kept = slots >= 0, qkv.clone()
    want = torch.full_like(cache, torch.nan)
    kv_store_ref(qkv[real][:, 3:], want, slots[real])
    kv_store(qkv[:, 3:], cache, slots)
    torch.testing.assert_close(cache, want, rtol=0, atol=0, equal_nan=True)
    cache.fill_(torch.nan)
    norm = (
        {"q_norm": torch.ones(8, device=device), "k_norm": torch.ones(8, device=device), "eps": 1e-6} if normed else {}
    )
    rope_kv_store(qkv, 3, rope_rows(rope_cache(9, 8).to(device), positions, qkv.dtype), cache, slots, **norm)
    assert torch.equal(cache.isnan(), want.isnan())
    assert torch.equal(cache[:, 1][~want[:, 1].isnan()], want[:, 1][~want[:, 1].isnan()])
    assert memory[0].isnan().all()
    assert torch.equal(qkv[:, 5:], kept[:, 5:])


@pytest.mark.parametrize("head_dim", [24, 128])
def test_a_token_is_normed_alike_in_any_batch(head_dim, dtype, device):
    """To the last bit, whatever stands beside it; 600 tokens are more than the smallest programs are for."""
    num_tokens = 600 if device.type == "cuda" else 9
    qkv, factors = torch.randn(num_tokens, 24, head_dim, device=device).to(dtype), rope_cache(30, head_dim).to(device)
    norms = torch.rand(2, head_dim, device=device).to(dtype)
    positions, slots = torch.arange(num_tokens, device=device) % 30, torch.arange(num_tokens, device=device)

    def run(tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part, cache = qkv[tokens].clone(), torch.zeros(38, 2, 2, 16, head_dim, dtype=dtype, device=device)
        rows, turning = store_rows(slots[tokens], 2, 16), rope_rows(factors, positions[tokens], qkv.dtype)
        rope_kv_store(part, 20, turning, cache, rows, q_norm=norms[0], k_norm=norms[1], eps=1e-6)
        return part[:, :20], cache[slots[tokens] // 16, :, :, slots[tokens] % 16]

    queries, pairs = run(slice(0, num_tokens))
    for token in range(0, num_tokens, num_tokens // 9):
        alone = run(slice(token, token + 1))
        assert torch.equal(alone[0][0], queries[token])
        assert torch.equal(alone[1][0], pairs[token])


def test_kv_store_refuses_what_does_not_fit(device):
    cache = torch.zeros(2, 2, 2, 4, 6, device=device)
    with pytest.raises(ValueError, match="for 3 tokens"):
        kv_store(torch.zeros(3, 4, 6, device=device), cache, torch.zeros(8, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="the cache"):
        kv_store(torch.zeros(3, 4, 5, device=device), cache, torch.zeros(12, dtype=torch.int64, device=device))


def test_rope_and_store_refuse_what_does_not_fit(device):
    cache, slots = torch.zeros(2, 2, 2, 4, 6, device=device), torch.tensor([1, 2], device=device)
    rows, positions = store_rows(slots, 2, 4), torch.tensor([0, 1], device=device)
    factors = rope_rows(rope_cache(4, 6).to(device), positions, torch.float32)
    with pytest.raises(ValueError, match="the cache"):
        rope_kv_store(torch.zeros(2, 5, 6, device=device), 2, factors, cache, rows)
    with pytest.raises(ValueError, match="head_dim >= 6"):
        rope_kv_store(torch.zeros(2, 6, 4, device=device), 2, factors, cache, rows)
    qkv, weight = torch.zeros(2, 6, 6, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match=r"\[\(6,\), None\]"):
        rope_kv_store(qkv, 2, factors, cache, rows, q_norm=weight)
    with pytest.raises(ValueError, match=r"two of \(6,\)"):
        rope_kv_store(qkv, 2, factors, cache, rows, q_norm=weight, k_norm=weight[:5])


COPIES = {
    "apart": ([0, 3], [1, 2]),
    "swapped, and one apart": ([0, 1, 5], [1, 0, 3]),
    "a chain": ([4, 3, 2, 1], [3, 2, 1, 0]),
    "one source twice": ([2, 2], [5, 4]),
    "none": ([], []),
    "more than one tile": (list(range(20)), [*range(1, 20), 0]),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 3, 151)])
def test_block_copy_reads_every_source_before_it_writes(shape, name, dtype, device):
    source, target = (torch.tensor(blocks, dtype=torch.int64, device=device) for blocks in COPIES[name])
    cache = torch.randn(20, *shape, device=device).to(dtype)
    want = block_copy_ref(cache, source, target)
    block_copy(cache, source, target)
    assert torch.equal(cache, want)


@pytest.mark.gpu
def test_overlapping_copies_of_large_blocks_do_not_race():
    """Blocks of 256 KiB, a ring of 16, many times: programs and warps run in every order."""
    cache = torch.randn(64, 2, 8, 64, 128, device="cuda").to(torch.bfloat16)
    source = torch.arange(16, device="cuda")
    target = source.roll(-1)
    want = cache.clone()
    for _ in range(50):
        want[target] = want[source]
        block_copy(cache, source, target)
    assert torch.equal(cache, want)


def test_block_copy_refuses_what_does_not_pair_up():
    with pytest.raises(ValueError, match="equal vectors"):
        block_copy(torch.zeros(3, 2), torch.tensor([0, 1]), torch.tensor([2]))


def test_costs_are_those_of_the_tensors():
    kv, slots = torch.empty(3, 2 * 4, 16, dtype=torch.float16), torch.empty(3, dtype=torch.int64)
    assert kv_store_cost(3, 4, 16, kv.dtype) == (2 * kv.nbytes + slots.nbytes, 0)
    queries, factors = torch.empty(3, 8, 16, dtype=torch.float16), rope_cache(3, 16)
    want = 2 * queries.nbytes + 2 * kv.nbytes + factors.nbytes + 2 * slots.nbytes
    assert rope_kv_store_cost(3, 8, 4, 16, 16, kv.dtype)[0] == want
    assert block_copy_cost(5, kv[0].numel(), kv.dtype) == (10 * kv[0].nbytes, 0)
