"""Slices of a vocabulary on every backend: the winner of their keys is the token of the whole, bit for bit."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of
from shoal.kernels.sampling.params import SamplingRows
from shoal.kernels.sampling.sample import sample_rows, sample_rows_ref
from shoal.kernels.sampling.sample_slice import LAST_TOKEN, best_keys, best_keys_cost, make_keys, read_keys, winners
from tests.kernels.sampling.test_sample_rows import make_logits, make_params

SETTINGS = [{"temperature": 0.0}, {}, {"temperature": 0.02}, {"temperature": 20.0}]
INFINITY = float("inf")


@pytest.fixture
def small_chunks(device, monkeypatch):
    """Several chunks in a small slice, where there are chunks."""
    if backend_of(torch.empty(0, device=device)) is not Backend.TORCH:
        from shoal.kernels.sampling import sample_triton

        monkeypatch.setattr(sample_triton, "SMALL_CHUNK", 128)
        monkeypatch.setattr(sample_triton, "LARGE_CHUNK", 256)


def choose_by_slices(logits, rows, params: SamplingRows, positions, width: int) -> torch.Tensor:
    """Tokens of slices of `width` columns, as many as cover the vocabulary and one, which is empty, more."""
    keys = [
        best_keys(logits[:, first : first + width], rows, params, positions, first)
        for first in range(0, logits.shape[1] + width, width)
    ]
    return winners(torch.stack(keys))


@pytest.mark.parametrize(("vocab_size", "width"), [(7, 4), (130, 48), (1001, 256), (1201, 1204)])
@pytest.mark.parametrize("num_rows", [4, 12])
@pytest.mark.usefixtures("small_chunks")
def test_slices_choose_as_the_whole(vocab_size, width, num_rows, device, dtype):
    params = make_params(SETTINGS, device)
    logits = make_logits(num_rows, vocab_size, dtype, device)
    rows = torch.arange(num_rows, device=device) % len(SETTINGS)
    positions = torch.arange(num_rows, device=device) * 2**31 + 5
    tokens = choose_by_slices(logits, rows, params, positions, width)
    assert torch.equal(tokens, sample_rows(logits, rows, params, positions))
    expected = sample_rows_ref(logits.cpu(), rows.cpu(), SamplingRows(*(p.cpu() for p in params)), positions.cpu())
    assert torch.equal(tokens.cpu(), expected)


@pytest.mark.parametrize("value", [-7.5, 0.0, 3.0])
def test_the_lowest_of_tied_tokens_wins(value, device, dtype):
    params = make_params([{"temperature": 0.0}], device)
    logits = torch.full((3, 96), value - 1, dtype=dtype, device=device)
    logits[0, [50, 61, 95]] = value
    logits[1, [31, 32]] = value
    logits[2, 3:] = value
    index = torch.zeros(3, dtype=torch.int64, device=device)
    assert choose_by_slices(logits, index, params, index, 32).tolist() == [50, 31, 3]


def test_zeros_of_either_sign_tie(device, dtype):
    params = make_params([{"temperature": 0.0}], device)
    logits = torch.full((1, 64), -1.0, dtype=dtype, device=device)
    logits[0, 5], logits[0, 40] = -0.0, 0.0
    index = torch.zeros(1, dtype=torch.int64, device=device)
    assert choose_by_slices(logits, index, params, index, 32).tolist() == [5]


@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_rows_without_usable_logits(settings, device, dtype):
    """What makes a row useless may lie in any slice."""
    params = make_params([settings] * 8, device)
    logits = make_logits(8, 300, dtype, device)
    logits[0, 3], logits[1, 299], logits[2, 140] = float("nan"), INFINITY, INFINITY
    logits[3] = -INFINITY
    logits[4, :250], logits[4, 251:] = -INFINITY, -INFINITY
    logits[5, 100] = -INFINITY
    rows = torch.arange(8, device=device)
    rows[6] = -1
    tokens = choose_by_slices(logits, rows, params, rows, 100)
    assert tokens[[0, 1, 2, 3, 6]].tolist() == [-1] * 5
    assert tokens[4] == 250
    assert torch.equal(tokens, sample_rows(logits, rows, params, rows))


def test_keys_order_as_scores_and_then_the_lower_token():
    ordered = [(-INFINITY, 0), (-3.5, 9), (-1e-40, 7), (0.0, 5), (-0.0, 4), (1e-40, 8), (2.0, 2**31 - 1), (INFINITY, 3)]
    scores, tokens = (torch.tensor(column) for column in zip(*ordered, strict=True))
    keys = make_keys(scores, tokens)
    assert torch.equal(keys, keys.sort().values)
    assert all(torch.equal(a, b) for a, b in zip(read_keys(keys), (scores, tokens), strict=True))


def test_many_rows_and_ranks(device):
    """More rows than a program of `winners` looks at."""
    keys = torch.randint(-(2**62), 2**62, (5, 300), generator=torch.Generator().manual_seed(1)).to(device)
    keys &= ~(1 << 31)  # no token is negative
    expected = [LAST_TOKEN - (key & 0xFFFFFFFF) for key in keys.amax(dim=0).tolist()]
    assert winners(keys).tolist() == expected


def test_no_rows(device):
    index = torch.empty(0, dtype=torch.int64, device=device)
    keys = best_keys(torch.empty(0, 9, device=device), index, make_params([{}], device), index, 8)
    assert keys.shape == (0,)
    assert winners(keys.view(1, 0)).shape == (0,)


def test_wrong_arguments_are_named():
    params, index = make_params([{}], torch.device("cpu")), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple of 4 tokens, not at 6"):
        best_keys(torch.zeros(2, 4), index, params, index, 6)
    with pytest.raises(ValueError, match="3 rows of logits"):
        best_keys(torch.zeros(3, 4), index, params, index, 4)
    with pytest.raises(ValueError, match="int64"):
        winners(torch.zeros(2, 4))


def test_cost_is_one_read_of_the_logits_and_one_key_a_row():
    num_bytes, flops = best_keys_cost(4, 1000, torch.bfloat16)
    assert num_bytes == 4 * 1000 * 2 + 4 * 8
    assert flops == 90 * 4 * 1000
