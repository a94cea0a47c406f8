"""Log-probabilities and ranks of chosen tokens, and the top-N tokens.

    logprob[p] = x[p, token[p]] - log(sum_v exp(x[p, v]))
    rank[p]    = 1 + the number of v with x[p, v] > x[p, token[p]]       (ties rank equal)

Legend: P rows of logits, V vocabulary, N top tokens. Sums are in fp32. On CUDA: score_triton.py, and torch's topk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backend import Backend, backend_of


class Scores(NamedTuple):
    logprobs: torch.Tensor  # float32 [P]
    ranks: torch.Tensor  # int64 [P]; 1 is the most probable
    top_ids: torch.Tensor  # int64 [P, N], the most probable first
    top_logprobs: torch.Tensor  # float32 [P, N]


class SliceScores(NamedTuple):
    totals: torch.Tensor  # float32 [P], the slice's log-sum-exp
    above: torch.Tensor  # int64 [P], its tokens more probable than the chosen one
    top_ids: torch.Tensor  # int64 [P, N], its top N, relative to its first token
    top_logits: torch.Tensor  # float32 [P, N]


def score_ref(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Scores:
    """The formula in torch, in fp32."""
    logprobs = logits.float().log_softmax(dim=1)
    token = token_ids.clamp(min=0).unsqueeze(1)
    ranks = (logits > logits.gather(1, token)).sum(dim=1) + 1
    top_logprobs, top_ids = logprobs.topk(num_top, dim=1)
    return Scores(logprobs.gather(1, token).squeeze(1), ranks, top_ids, top_logprobs)


def score(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Scores:
    """Scores of token_ids int64 [P] under float logits [P, V], with the `num_top` <= V most probable of each.

    Rows may be strided. Token -1 gets the scores of token 0.
    """
    if logits.dim() != 2 or logits.stride(1) != 1 or token_ids.shape != logits.shape[:1]:
        raise ValueError(
            f"logits {list(logits.shape)} with strides {logits.stride()} and token_ids {list(token_ids.shape)} must be "
            "[P, V] without gaps in a row and [P]"
        )
    if num_top > logits.shape[1]:
        raise ValueError(f"{num_top} top tokens of a vocabulary of {logits.shape[1]} are too many")
    if backend_of(logits) is Backend.TORCH:
        return score_ref(logits, token_ids, num_top)
    from .score_triton import score_triton

    logprobs, totals, ranks = score_triton(logits, token_ids)
    top_logits, top_ids = logits.topk(num_top, dim=1)
    return Scores(logprobs, ranks, top_ids, top_logits.float() - totals.unsqueeze(1))


def score_slice(logits: torch.Tensor, chosen: torch.Tensor, num_top: int) -> SliceScores:
    """A slice's share, from its logits [P, V], of the scores of tokens with logits `chosen` float32 [P].

    `num_top` <= V; a slice may be empty.
    """
    if logits.dim() != 2 or chosen.shape != logits.shape[:1] or num_top > logits.shape[1]:
        raise ValueError(
            f"logits {list(logits.shape)} and chosen {list(chosen.shape)} must be [P, V] and [P], with V of at least "
            f"the {num_top} top tokens that are asked for"
        )
    top_logits, top_ids = logits.topk(num_top, dim=1)
    if logits.shape[1] == 0:
        totals, above = torch.full_like(chosen, float("-inf")), torch.zeros_like(chosen, dtype=torch.int64)
    elif backend_of(logits) is Backend.TORCH:
        totals, above = logits.float().logsumexp(dim=1), (logits > chosen.unsqueeze(1)).sum(dim=1)
    else:
        from .score_triton import score_slice_triton

        totals, above = score_slice_triton(logits, chosen)
    return SliceScores(totals, above, top_ids, top_logits.float())


def score_cost(num_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops)."""
    size = num_rows * vocab_size
    return 2 * size * dtype.itemsize, 4 * size
