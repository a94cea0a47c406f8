"""Token embedding and output head, their vocabulary rows split over tensor-parallel ranks.

Every rank holds ceil(vocab / ranks) rows; the last rank's rows beyond the vocabulary are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...kernels.embedding import embed
from ...quant.methods import LinearMethod
from ..comm import ParallelContext
from .weights import Layer, Source, WeightSlot, empty_parameter


class VocabParallelEmbedding(Layer):
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
        if self.comm.tp_size > 1 or self.weight.is_cuda:
            return self.comm.all_reduce(embed(input_ids, self.weight, self.first_row, self.scale))
        x = F.embedding(input_ids, self.weight)  # every id is this rank's: nothing to mask
        return x if self.scale == 1.0 else x * self.scale

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        if self.num_filled:
            rows = slice(self.first_row, self.first_row + self.num_filled)
            source = Source(f"{prefix}.weight", (self.vocab_size, self.weight.shape[1]), (rows,))
            yield WeightSlot(self.weight[: self.num_filled], (source,))


class OutputHead(Layer):
    """hidden [K, hidden] -> logits [K, vocab]: fp32 on the CPU, the model's dtype on a GPU.

    On a GPU whoever reads the logits does so in a kernel, which computes in fp32 as it reads.
    It has rows of its own, or multiplies by an embedding's (tied); on CPU a tied head keeps a packed copy of them.
    """

    def __init__(self, rows: VocabParallelEmbedding, method: LinearMethod, *, tied: bool) -> None:
        super().__init__()
        self.comm, self.method, self.vocab_size, self.tied = rows.comm, method, rows.vocab_size, tied
        self.rows: VocabParallelEmbedding | None = rows
        self._operands: dict[str, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        local = self.method.apply(self._operands, hidden, None)
        logits = self.comm.all_gather(local)[:, : self.vocab_size]
        return logits if logits.is_cuda else logits.float()

    def prepare(self) -> None:
        """Called once the weights are loaded. Rows that the head shares with no embedding are let go."""
        assert self.rows is not None
        self._operands = self.method.prepare({"weight": self.rows.weight})
        self.rows = None

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        if not self.tied and self.rows is not None:
            yield from self.rows.weight_slots(prefix)
