"""Log-probabilities, ranks and top tokens, against double precision."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.sampling.score import score, score_cost, score_slice


@pytest.mark.parametrize(("vocab_size", "num_top"), [(1, 1), (33, 4), (4096, 20), (9001, 5), (130, 0)])
def test_scores_equal_log_softmax(vocab_size, num_top, device, dtype):
    generator = torch.Generator().manual_seed(vocab_size)
    padded = torch.full((6, vocab_size + 3), float("nan"))
    padded[:, :vocab_size] = torch.randn(6, vocab_size, generator=generator) * 4 + 50
    logits = padded.to(device, dtype)[:, :vocab_size]
    if vocab_size > 1:
        logits[2, : vocab_size // 2] = float("-inf")
    token_ids = torch.randint(0, vocab_size, (6,), generator=generator).to(device)
    token_ids[3] = logits[3].argmax()
    token_ids[2] = vocab_size - 1
    logprobs, ranks, top_ids, top_logprobs = score(logits, token_ids, num_top)
    exact = logits.double().log_softmax(1)
    chosen = exact.gather(1, token_ids[:, None])
    torch.testing.assert_close(logprobs.double(), chosen[:, 0], atol=2e-5, rtol=1e-5)
    assert torch.equal(ranks, (exact > chosen).sum(1) + 1)
    assert logprobs.dtype == top_logprobs.dtype == torch.float32
    assert top_ids.shape == top_logprobs.shape == (6, num_top)
    torch.testing.assert_close(top_logprobs.double(), exact.topk(num_top, dim=1).values, atol=2e-5, rtol=1e-5)
    assert torch.equal(exact.gather(1, top_ids), exact.topk(num_top, dim=1).values)


def test_ties_rank_equal(device):
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.0]] * 4, device=device)
    assert score(logits, torch.arange(4, device=device), 1).ranks.tolist() == [1, 4, 1, 3]


def test_no_token_and_no_rows(device):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)).to(device)
    none, first = (score(logits, torch.full((2,), token, device=device), 2) for token in (-1, 0))
    assert all(torch.equal(a, b) for a, b in zip(none, first, strict=True))
    assert [len(each) for each in score(logits[:0], torch.empty(0, dtype=torch.int64, device=device), 2)] == [0] * 4


@pytest.mark.parametrize("num_top", [0, 3])
def test_slices_add_up_to_the_whole(num_top, device, dtype):
    """A slice of -inf alone, one of more than a chunk, one that is small, and an empty one."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(4, 4600, generator=generator) * 4 + 50).to(device, dtype)
    logits[1, :100] = float("-inf")
    chosen = logits[torch.arange(4), torch.randint(0, 4600, (4,), generator=generator)].float()
    parts = [score_slice(logits[:, a:b], chosen, num_top) for a, b in ((0, 100), (100, 4500), (4500, 4600))]
    empty = score_slice(logits[:, :0], chosen, 0)
    assert empty.totals.tolist() == [float("-inf")] * 4
    assert empty.above.tolist() == [0] * 4
    totals = torch.stack([part.totals for part in parts]).logsumexp(0)
    torch.testing.assert_close(totals.double(), logits.double().logsumexp(1), atol=2e-5, rtol=1e-6)
    assert parts[0].totals[1] == float("-inf")
    assert torch.equal(torch.stack([part.above for part in parts]).sum(0), (logits.float() > chosen[:, None]).sum(1))
    top = torch.cat([part.top_logits for part in parts], dim=1).topk(num_top, dim=1).values
    assert torch.equal(top, logits.float().topk(num_top, dim=1).values)
    assert torch.equal(logits[:, 4500:].gather(1, parts[2].top_ids).float(), parts[2].top_logits)


def test_wrong_arguments_are_named():
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="20 top tokens of a vocabulary of 5"):
        score(torch.zeros(2, 5), index, 20)
    with pytest.raises(ValueError, match=r"\[3\]"):
        score(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="the 6 top tokens"):
        score_slice(torch.zeros(2, 5), torch.zeros(2), 6)


def test_cost():
    assert score_cost(2, 10, torch.float16) == (80, 80)
