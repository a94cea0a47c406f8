"""A rank's slice of the vocabulary, and exchanges of logits within a stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .comm import ParallelContext

# Multiples of 16 tokens: four share sampling noise, and half-precision logits are read 16 bytes at
# a time.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class VocabularySlice:
    """Tokens whose embedding and head rows a rank holds: equal shares, the last ones padded."""

    vocab_size: int
    comm: ParallelContext

    @property
    def width(self) -> int:
        """Rows of a share with padding."""
        ranks = self.comm.tp_size
        return self.vocab_size if ranks == 1 else -(-self.vocab_size // (ranks * _ALIGNMENT)) * _ALIGNMENT

    @property
    def first(self) -> int:
        return self.comm.tp_rank * self.width

    @property
    def size(self) -> int:
        """Tokens without padding; the last ranks may have none."""
        return min(max(self.vocab_size - self.first, 0), self.width)

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Join every rank's logits [K, size]: [K, vocab_size]."""
        if self.comm.tp_size == 1:
            return logits
        return self.comm.all_gather(self._padded(logits, len(logits)))[:, : self.vocab_size]

    def deal(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [K, size] of every rank -> this rank's share of whole rows [ceil(K/ranks),
        vocab_size].

        It receives 1/ranks of what `whole` gathers.
        """
        ranks, share = self.comm.tp_size, self._share(len(logits))
        blocks = self.comm.all_to_all(self._padded(logits, ranks * share).view(ranks, share, self.width))
        return blocks.transpose(0, 1).reshape(share, ranks * self.width)[:, : self.vocab_size]

    def dealt(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """This rank's share of a replicated [K] tensor, padded to ceil(K/ranks)."""
        share = self._share(len(values))
        missing = share * self.comm.tp_size - len(values)
        padded = F.pad(values, (0, missing), value=padding) if missing else values
        return padded[self.comm.tp_rank * share :][:share]

    def collect(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """Each rank's [ceil(count/ranks)] values for the rows of `deal` -> [count] for all rows."""
        return self.comm.all_gather(values)[:count]

    def _share(self, num_rows: int) -> int:
        return -(-num_rows // self.comm.tp_size)

    def _padded(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        missing = (self.width - logits.shape[1], num_rows - len(logits))
        return F.pad(logits, (0, missing[0], 0, missing[1])) if any(missing) else logits.contiguous()
