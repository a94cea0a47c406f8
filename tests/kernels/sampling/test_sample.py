"""The sampler's arithmetic against plain-Python oracles, published Philox vectors and the distribution it must draw."""

import math

import pytest
import torch

from shoal.kernels.sampling.params import SamplingRows
from shoal.kernels.sampling.sample import filter_logits, gumbel_noise, philox, sample_rows

MASK = 0xFFFFFFFF


def philox_reference(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as the paper writes it, on Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_gives_the_published_vectors(counter, key, words):
    assert philox_reference(counter, key) == words


def test_philox_equals_the_reference():
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x299F31D0A4093822]
    positions = [0, 7, 2**31, 2**33 + 5, 123_456, 1]
    signed = [s - 2**64 if s >= 2**63 else s for s in seeds]
    words = philox(torch.tensor(signed), torch.tensor(positions), 9)
    for k, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        for c in range(9):
            expected = philox_reference((c, position & MASK, position >> 32, 0), (seed & MASK, seed >> 32))
            assert tuple(words[k, c].tolist()) == expected


@pytest.mark.parametrize("vocab_size", [1, 3, 64, 1001])
def test_noise_is_finite_and_does_not_depend_on_the_batch(vocab_size):
    seeds, positions = torch.arange(17) * 977, torch.arange(17) * 3
    noise = gumbel_noise(seeds, positions, vocab_size)
    assert noise.shape == (17, vocab_size)
    assert torch.isfinite(noise).all()
    for k in (0, 8, 16):
        assert torch.equal(noise[k : k + 1], gumbel_noise(seeds[k : k + 1], positions[k : k + 1], vocab_size))


def one_row(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=42, device="cpu") -> SamplingRows:
    """Parameters of a single row, which every row of logits may follow."""
    types = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
    values = (temperature, top_k, top_p, min_p, seed)
    return SamplingRows(*(torch.tensor([v], dtype=t, device=device) for v, t in zip(values, types, strict=True)))


def test_draws_follow_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -30.0])
    draws, temperature = 40_000, 1.7
    rows = torch.zeros(draws, dtype=torch.int64)
    tokens = sample_rows(logits.repeat(draws, 1), rows, one_row(temperature), torch.arange(draws))
    observed = torch.bincount(tokens, minlength=5).double()
    expected = (logits / temperature).double().softmax(0) * draws
    chi_square = (((observed - expected) ** 2) / expected.clamp(min=1e-9))[:4].sum()
    assert chi_square < 21.1  # 0.01 % point with 3 degrees of freedom: fixed seed, so this never flakes
    assert observed[4] == 0


def naive_filter(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that stay, by sorting and adding up."""
    kept = [v for v in range(len(logits)) if logits[v] >= max(logits) + (math.log(min_p) if min_p else -math.inf)]
    kept.sort(key=lambda v: -logits[v])
    if top_k:
        kept = kept[:top_k]
    weights = [math.exp(logits[v] - max(logits)) for v in kept]
    result, mass = set(), 0.0
    for v, weight in zip(kept, weights, strict=True):
        if result and mass >= top_p * sum(weights) and top_p < 1:
            break
        result.add(v)
        mass += weight
    return result


@pytest.mark.parametrize("vocab_size", [2, 7, 130])
def test_filters_keep_what_the_naive_loop_keeps(vocab_size):
    generator = torch.Generator().manual_seed(vocab_size)
    cases = [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (0, 0.5, 0.0),
        (0, 0.95, 0.1),
        (9, 0.7, 0.02),
        (10**6, 1e-6, 0),
    ]
    logits = torch.randn(len(cases), vocab_size, generator=generator) * 3
    top_k, top_p, min_p = (torch.tensor(column) for column in zip(*cases, strict=True))
    filtered = filter_logits(logits, top_k, top_p.float(), min_p.float())
    for row, case in enumerate(cases):
        kept = set(torch.isfinite(filtered[row]).nonzero().flatten().tolist())
        assert kept == naive_filter(logits[row].tolist(), *case), case
        index = sorted(kept)
        assert torch.equal(filtered[row, index], logits[row, index])
