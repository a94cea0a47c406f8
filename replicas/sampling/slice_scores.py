"""Log-probabilities over logits that are split by vocabulary.

Ranks exchange each slice's log-sum-exp, rank of the scored token and top-k, not logits. All get the
same scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...kernels.sampling.sample_slice import make_keys, read_keys
from ...kernels.sampling.score import Scores, score_slice
from ..parallel.vocabulary import VocabularySlice

_LOWEST = -(2**63)  # below the key of any score


def score_slices(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int, own: VocabularySlice) -> Scores:
    """`kernels.score.score` of token_ids int64 [P] over the slices [P, size] of all ranks.

    num_top: at most the vocabulary's size. Ties are in order of token id.
    """
    ranks, num_rows = own.comm.tp_size, len(logits)
    chosen = _chosen_logits(logits, token_ids.clamp(min=0), own)
    part = score_slice(logits, chosen, min(num_top, own.size))
    top = make_keys(part.top_logits, part.top_ids + own.first)
    totals = part.totals.view(torch.int32).long().unsqueeze(1)
    top = F.pad(top, (0, min(num_top, own.width) - top.shape[1]), value=_LOWEST)
    sent = torch.cat((totals, part.above.unsqueeze(1), top), dim=1)
    found = own.comm.all_gather(sent).view(num_rows, ranks, sent.shape[1])
    total = found[:, :, 0].int().view(torch.float32).logsumexp(dim=1)
    above = found[:, :, 1].sum(dim=1)
    top_logits, top_ids = read_keys(found[:, :, 2:].flatten(1).topk(num_top, dim=1).values)
    return Scores(chosen - total, above + 1, top_ids, top_logits - total.unsqueeze(1))


def _chosen_logits(logits: torch.Tensor, token_ids: torch.Tensor, own: VocabularySlice) -> torch.Tensor:
    """Logits float32 [P] of tokens in any slice."""
    places = (token_ids - own.first).unsqueeze(1)
    chosen = torch.full_like(places, float("-inf"), dtype=torch.float32)
    if own.size:
        here = (places >= 0) & (places < own.size)
        found = logits.gather(1, places.clamp(0, own.size - 1)).float()
        chosen = torch.where(here, found, chosen)
    return own.comm.all_gather(chosen.flatten()).view(own.comm.tp_size, -1).amax(dim=0)
