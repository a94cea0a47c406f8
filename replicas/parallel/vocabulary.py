"""A rank's slice of the vocabulary, and what the ranks of a stage exchange of their slices' logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .comm import ParallelContext

# Slices are a multiple of so many tokens: four share their sampling noise, and a row of logits in half precision is
# read sixteen bytes at a time.
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class VocabularySlice:
    """The tokens whose rows of embedding and head a rank holds: equal shares, the last ones being filled in part."""

    vocab_size: int
    comm: ParallelContext

    @property
    def width(self) -> int:
        """Rows of every rank's share, filled or not."""
        ranks = self.comm.tp_size
        return self.vocab_size if ranks == 1 else -(-self.vocab_size // (ranks * _ALIGNMENT)) * _ALIGNMENT

    @property
    def first(self) -> int:
        """The first token."""
        return self.comm.tp_rank * self.width

    @property
    def size(self) -> int:
        """How many tokens there are; the last ranks may have none."""
        return min(max(self.vocab_size - self.first, 0), self.width)

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Every rank's logits [K, size], joined: [K, vocab_size]."""
        if self.comm.tp_size == 1:
            return logits
        return self.comm.all_gather(self._padded(logits, len(logits)))[:, : self.vocab_size]

    def deal(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [K, size] of every rank -> whole rows [ceil(K / ranks), vocab_size]: this rank's share of the rows.

        A rank receives 1 / ranks of what `whole` would bring it, and has as much less to do with it.
        """
        ranks, share = self.comm.tp_size, self._share(len(logits))
        blocks = self.comm.all_to_all(self._padded(logits, ranks * share).view(ranks, share, self.width))
        return blocks.transpose(0, 1).reshape(share, ranks * self.width)[:, : self.vocab_size]

    def dealt(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """Of values [K], the same on every rank, those of the rows that `deal` brings, then `padding`."""
        share = self._share(len(values))
        missing = share * self.comm.tp_size - len(values)
        padded = F.pad(values, (0, missing), value=padding) if missing else values
        return padded[self.comm.tp_rank * share :][:share]

    def collect(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """values [ceil(count / ranks)] of the rows that `deal` brought to each rank -> [count], those of all rows."""
        return self.comm.all_gather(values)[:count]

    def _share(self, num_rows: int) -> int:
        return -(-num_rows // self.comm.tp_size)

    def _padded(self, logits: torch.Tensor, num_rows: int) -> torch.Tensor:
        missing = (self.width - logits.shape[1], num_rows - len(logits))
        return F.pad(logits, (0, missing[0], 0, missing[1])) if any(missing) else logits.contiguous()
