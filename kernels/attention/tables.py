"""Per-step tensors that the Triton attention kernels read. Legends as in paged_decode.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Decode input of Triton."""

    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, M]
    window: int | None
    num_splits: int  # programs per kv head of a sequence
    min_blocks: int  # minimum blocks of a split
    arrivals: torch.Tensor  # int32 [S, KV], finished splits: zeros before and after each launch

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)


@dataclass(frozen=True, slots=True)
class PrefillTables:
    """Prefill input of Triton, of S slices."""

    starts: torch.Tensor  # int32 [S + 1]
    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, M]
    window: int | None
