"""Token embedding and output head, their vocabulary rows split over tensor-parallel ranks.

Every rank holds as many rows (vocabulary.py); those beyond the vocabulary are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...kernels.linear.embedding import embed
from ...quant.methods.unquantized import LinearMethod
from ..parallel.comm import ParallelContext
from ..parallel.vocabulary import VocabularySlice
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
        self.slice = VocabularySlice(vocab_size, comm)
        self.scale = float(torch.tensor(scale, dtype=dtype))
        self.weight = empty_parameter((self.slice.width, hidden_size), dtype, device)
        self.weight[self.slice.size :].zero_()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.comm.tp_size > 1 or self.weight.is_cuda:
            return self.comm.all_reduce(embed(input_ids, self.weight, self.slice.first, self.scale))
        x = F.embedding(input_ids, self.weight)  # every id is this rank's: nothing to mask
        return x if self.scale == 1.0 else x * self.scale

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        first, size = self.slice.first, self.slice.size
        shape = (self.slice.vocab_size, self.weight.shape[1])
        source = Source(f"{prefix}.weight", shape, (slice(first, first + size),))
        yield WeightSlot(self.weight[:size], (source,))


class OutputHead(Layer):
    """hidden [K, hidden] -> logits [K, size] of the rank's slice: fp32 on the CPU, the model's dtype on a GPU.

    On a GPU whoever reads the logits does so in a kernel, which computes in fp32 as it reads.
    It has rows of its own, or multiplies by an embedding's (tied); on CPU a tied head keeps a packed copy of them.
    """

    def __init__(self, rows: VocabParallelEmbedding, method: LinearMethod, *, tied: bool) -> None:
        super().__init__()
        self.method, self.slice, self.tied = method, rows.slice, tied
        self.rows: VocabParallelEmbedding | None = rows
        self._operands: dict[str, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.method.apply(self._operands, hidden, None)[:, : self.slice.size]
        return logits if logits.is_cuda else logits.float()

    def prepare(self) -> None:
        """Called once the weights are loaded. Rows that the head shares with no embedding are let go."""
        assert self.rows is not None
        self._operands = self.method.prepare({"weight": self.rows.weight})
        self.rows = None

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        if not self.tied and self.rows is not None:
            yield from self.rows.weight_slots(prefix)
