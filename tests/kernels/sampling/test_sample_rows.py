"""sample_rows on every backend: the tokens of the plain loop, whatever the mixture of rows, and -1 for broken ones."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of
from shoal.kernels.sampling.params import SamplingRows
from shoal.kernels.sampling.sample import gumbel_noise, sample_rows, sample_rows_cost, sample_rows_ref

FILTERS = {
    "greedy": {"temperature": 0.0},
    "temperature alone": {},
    "top-k": {"top_k": 5},
    "top-k of one": {"top_k": 1},
    "top-k above the vocabulary": {"top_k": 10**6},
    "top-p": {"top_p": 0.7},
    "top-p of almost all": {"top_p": 0.9999},
    "top-p of nothing": {"top_p": 0.0},
    "min-p": {"min_p": 0.05},
    "all at once": {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    "top-k of many, top-p": {"top_k": 600, "top_p": 0.9},
    "top-k of more than min-p keeps": {"top_k": 500, "top_p": 0.9, "min_p": 0.1},
    "cold": {"temperature": 0.02, "top_p": 0.95},
    "hot": {"temperature": 20.0, "top_p": 0.5},
}
TYPES = SamplingRows(torch.float32, torch.int32, torch.float32, torch.float32, torch.int64)
DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def make_params(filters, device: torch.device) -> SamplingRows:
    """One row for each of `filters`, with a seed of its own; half of the seeds use the key's highest bit."""
    rows = [DEFAULTS | each for each in filters]
    seeds = [(-1) ** i * (977 * i + 2**40) for i in range(len(rows))]
    columns = [[row[name] for row in rows] for name in DEFAULTS] + [seeds]
    return SamplingRows(*(torch.tensor(c, dtype=t, device=device) for c, t in zip(columns, TYPES, strict=True)))


def naive_token(logits: list[float], noise: list[float], temperature, top_k, top_p, min_p) -> int:
    """The token by a sort and a loop in double precision. Tokens that tie with the last one kept are kept."""
    if temperature == 0.0:
        return max(range(len(logits)), key=lambda v: logits[v])
    z = [x / temperature for x in logits]
    peak = max(z)
    kept = sorted((v for v in range(len(z)) if min_p == 0 or z[v] >= peak + math.log(min_p)), key=lambda v: -z[v])
    if 0 < top_k < len(kept):
        kept = [v for v in kept if z[v] >= z[kept[top_k - 1]]]
    if top_p < 1.0:
        total, before, last = sum(math.exp(z[v] - peak) for v in kept), 0.0, kept[0]
        for v in kept:
            if before >= top_p * total:
                break
            before, last = before + math.exp(z[v] - peak), v
        kept = [v for v in kept if z[v] >= z[last]]
    return max(kept, key=lambda v: z[v] + noise[v])


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, seed=0) -> torch.Tensor:
    """Random logits, some likely tokens among them, in rows with NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((num_rows, vocab_size + 5), float("nan"))
    buffer[:, :vocab_size] = torch.randn(num_rows, vocab_size, generator=generator) * 2
    buffer[:, : vocab_size // 8] += torch.rand(num_rows, vocab_size // 8, generator=generator) * 6
    return buffer.to(device, dtype)[:, :vocab_size]


@pytest.mark.parametrize("vocab_size", [2, 7, 130, 1001])
def test_tokens_are_those_of_the_naive_loop(vocab_size, device, dtype):
    params = make_params(FILTERS.values(), device)
    logits = make_logits(len(FILTERS), vocab_size, dtype, device)
    rows = torch.randperm(len(FILTERS), generator=torch.Generator().manual_seed(3)).to(device)
    positions = torch.arange(len(rows), device=device) * 2**31 + 5
    tokens = sample_rows(logits, rows, params, positions)
    assert tokens.dtype == torch.int64
    noise = gumbel_noise(params.seed[rows].cpu(), positions.cpu(), vocab_size)
    names = list(FILTERS)
    for k, row in enumerate(rows.tolist()):
        settings = DEFAULTS | FILTERS[names[row]]
        assert tokens[k] == naive_token(logits[k].tolist(), noise[k].tolist(), **settings), names[row]


@pytest.fixture
def small_chunks(device, monkeypatch):
    """Many chunks in a small vocabulary, and room for few candidates."""
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        return
    from shoal.kernels.sampling import sample_limits_triton, sample_triton

    monkeypatch.setattr(sample_triton, "SMALL_CHUNK", 128)
    monkeypatch.setattr(sample_triton, "LARGE_CHUNK", 256)
    for name, value in (("CHUNK", 256), ("TURN", 128), ("CAPACITY", 32)):
        monkeypatch.setattr(sample_limits_triton, name, value)


@pytest.mark.parametrize("num_rows", [7, 14])
@pytest.mark.usefixtures("small_chunks")
def test_a_vocabulary_of_several_chunks(num_rows, device, dtype):
    """Three chunks of the filters and three or six of the choice; candidates that fit, and candidates that do not."""
    vocab_size = 701
    params = make_params(FILTERS.values(), device)
    for first in range(0, len(FILTERS), num_rows):
        rows = (torch.arange(num_rows, device=device) + first) % len(FILTERS)
        logits = make_logits(num_rows, vocab_size, dtype, device, seed=first)
        positions = torch.arange(num_rows, device=device) + 11
        expected = sample_rows_ref(logits.cpu(), rows.cpu(), SamplingRows(*(p.cpu() for p in params)), positions.cpu())
        assert torch.equal(sample_rows(logits, rows, params, positions).cpu(), expected)


@pytest.mark.usefixtures("small_chunks")
def test_equal_logits_stay_or_go_together(device, dtype):
    """Where all tie, no filter leaves any out: the token is that of temperature alone."""
    filters = [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5, "min_p": 0.9}]
    params = make_params(filters, device)
    params = params._replace(seed=torch.full_like(params.seed, 99))
    logits = torch.full((4, 1100), -2.5, dtype=dtype, device=device)
    index = torch.arange(4, device=device)
    tokens = sample_rows(logits, index, params, torch.full_like(index, 8)).tolist()
    assert len(set(tokens)) == 1
    assert tokens[0] == gumbel_noise(params.seed[:1].cpu(), torch.tensor([8]), 1100).argmax()


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_rows_without_usable_logits(settings, device, dtype):
    params = make_params([settings] * 7, device)
    logits = make_logits(7, 1100, dtype, device)
    logits[0, 3] = float("nan")
    logits[1, 1099] = float("inf")
    logits[2] = float("-inf")
    logits[3, 1:] = float("-inf")
    logits[4] = float("nan")
    rows = torch.arange(7, device=device)
    rows[6] = -1
    tokens = sample_rows(logits, rows, params, rows).tolist()
    assert tokens[:5] == [-1, -1, -1, 0, -1]
    assert 0 <= tokens[5] < 1100
    assert tokens[6] == -1


@pytest.mark.usefixtures("small_chunks")
def test_a_row_does_not_depend_on_its_neighbours(device):
    params = make_params(FILTERS.values(), device)
    logits = make_logits(len(FILTERS), 700, torch.float32, device)
    rows = torch.arange(len(FILTERS), device=device)
    together = sample_rows(logits, rows, params, rows)
    for k in (0, 1, 5, 9):
        assert sample_rows(logits[k : k + 1], rows[k : k + 1], params, rows[k : k + 1]) == together[k]


def test_no_rows(device):
    params = make_params([{}], device)
    index = torch.empty(0, dtype=torch.int64, device=device)
    assert sample_rows(torch.empty(0, 9, device=device), index, params, index).shape == (0,)


def test_wrong_arguments_are_named():
    params = make_params([{}], torch.device("cpu"))
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="float64"):
        sample_rows(torch.zeros(2, 4, dtype=torch.float64), index, params, index)
    with pytest.raises(ValueError, match="strides"):
        sample_rows(torch.zeros(4, 2).t(), index, params, index)
    with pytest.raises(ValueError, match="3 rows of logits"):
        sample_rows(torch.zeros(3, 4), index, params, index)


def test_cost_reads_each_logit_once():
    assert sample_rows_cost(2, 100, torch.bfloat16)[0] == 400


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_thousand_rows_differ_from_torch_in_near_ties_alone(dtype):
    """A token may differ where fp32 rounding decides: its own score, or its place at the edge of a filter."""
    device = torch.device("cuda")
    filters = list(FILTERS.values()) * 170
    params, logits = make_params(filters, device), make_logits(len(filters), 5003, dtype, device)
    rows = torch.arange(len(filters), device=device)
    positions = rows * 3
    tokens, expected = (choose(logits, rows, params, positions) for choose in (sample_rows, sample_rows_ref))
    other = (tokens != expected).nonzero().flatten()
    assert len(other) <= 4
    plain = [k for k in other.tolist() if not filters[k]]
    scores = logits[plain].float() / 0.8 + gumbel_noise(params.seed[plain], positions[plain], 5003)
    for score, k in zip(scores, plain, strict=True):
        assert score[tokens[k]].item() == pytest.approx(score[expected[k]].item(), abs=1e-5)
