"""Token embedding and output head, their vocabulary rows split over tensor-parallel ranks.

Every rank has equally many rows (vocabulary.py); rows beyond the vocabulary are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels.linear.embedding import embed
from ...quant.methods.linear_method import LinearMethod
from ..parallel.comm import ParallelContext
from ..parallel.vocabulary import VocabularySlice
from .weights import Layer, Source, WeightSlot, empty_parameter


class VocabParallelEmbedding(Layer):
    """int64 [T] -> [T, hidden], times `scale` rounded to the model's dtype (Gemma: sqrt(hidden))."""

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
        x = F.embedding(input_ids, self.weight)  # every id is this rank's
        return x if self.scale == 1.0 else x * self.scale

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        first, size = self.slice.first, self.slice.size
        shape = (self.slice.vocab_size, self.weight.shape[1])
        source = Source(f"{prefix}.weight", shape, (slice(first, first + size),))
        yield WeightSlot(self.weight[:size], (source,))


class OutputHead(Layer):
    """hidden [K, hidden] -> logits [K, size] of the rank's slice: fp32 on CPU, model dtype on GPU.

    GPU kernels that read the logits compute in fp32. `tied`: the head uses the embedding's rows; on
    CPU a packed copy.
    """

    def __init__(
        self,
        rows: VocabularySlice,
        hidden_size: int,
        method: LinearMethod,
        *,
        dtype: torch.dtype,
        device: torch.device,
        tied: VocabParallelEmbedding | None,
    ) -> None:
        super().__init__()
        self.method, self.slice, self.hidden_size = method, rows, hidden_size
        self._tied = [] if tied is None else [tied]  # in a list, so that it is no submodule
        self.specs = method.specs(dtype) if tied is None else ()
        self.weights = nn.ParameterDict(
            {one.suffix: empty_parameter(one.shape(rows.width, hidden_size), one.dtype, device) for one in self.specs}
        )
        for weight in self.weights.values():
            weight.zero_()  # rows beyond the vocabulary stay zero
        self._operands: dict[str, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.method.apply(self._operands, hidden, None)[:, : self.slice.size]
        return logits if logits.is_cuda else logits.float()

    def prepare(self) -> None:
        """Call once the weights are loaded; frees them unless an embedding shares them."""
        weights = {"weight": self._tied[0].weight} if self._tied else dict(self.weights.items())
        self._operands = self.method.prepare(weights)
        self._tied.clear()
        self.weights.clear()

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        first, size = self.slice.first, self.slice.size
        every = slice(0, self.hidden_size)
        for spec in self.specs:
            shape = spec.shape(self.slice.vocab_size, self.hidden_size)
            source = Source(f"{prefix}.{spec.suffix}", shape, spec.index(slice(first, first + size), every))
            yield WeightSlot.of(spec, self.weights[spec.suffix][spec.index(slice(0, size), every)], (source,))
