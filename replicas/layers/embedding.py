"""Token embedding and output head, their vocabulary rows split over tensor-parallel ranks.

Every rank holds ceil(vocab / ranks) rows; the last rank's rows beyond the vocabulary are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ..comm import ParallelContext
from .weights import Source, WeightSlot, empty_parameter


class VocabParallelEmbedding(nn.Module):
    """input_ids int64 [T] -> [T, hidden], times `scale` rounded to the model's dtype (Gemma: sqrt(hidden))."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        comm: ParallelContext,
        *,
        dtype: torch.dtype,
        device: torch.device,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.comm = comm
        self.vocab_size = vocab_size
        self.num_rows = -(-vocab_size // comm.tp_size)
        self.first_row = comm.tp_rank * self.num_rows
        self.scale = float(torch.tensor(scale, dtype=dtype))
        self.num_filled = min(max(vocab_size - self.first_row, 0), self.num_rows)
        self.weight = empty_parameter((self.num_rows, hidden_size), dtype, device)
        self.weight[self.num_filled :].zero_()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.comm.tp_size > 1:
            local = input_ids - self.first_row
            foreign = (local < 0) | (local >= self.num_rows)
            x = F.embedding(local.masked_fill(foreign, 0), self.weight)
            x = self.comm.all_reduce(x.masked_fill_(foreign[:, None], 0.0))
        else:
            x = F.embedding(input_ids, self.weight)
        return x if self.scale == 1.0 else x * self.scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [K, hidden] -> float32 [K, vocab], with the same rows as the output head."""
        return self.comm.all_gather(F.linear(hidden, self.weight))[:, : self.vocab_size].float()

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        if self.num_filled:
            rows = slice(self.first_row, self.first_row + self.num_filled)
            source = Source(f"{prefix}.weight", (self.vocab_size, self.weight.shape[1]), (rows,))
            yield WeightSlot(self.weight[: self.num_filled], (source,))
