"""Inputs of the attention kernels: the tensors of one step that Triton reads. Legends as in paged_decode.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """What Triton reads: the step's own tensors, and how many programs may share a sequence."""

    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, M]
    window: int | None
    num_splits: int  # programs launched for each kv head of a sequence
    min_blocks: int  # blocks of a split, at least
    arrivals: torch.Tensor  # int32 [S, KV], zeros: splits that are done; each launch leaves it at zeros again

    @property
    def num_seqs(self) -> int:
        return len(self.context_lens)


@dataclass(frozen=True, slots=True)
class PrefillTables:
    """What Triton reads: the step's own tensors, of S slices."""

    starts: torch.Tensor  # int32 [S + 1]
    context_lens: torch.Tensor  # int32 [S]
    block_tables: torch.Tensor  # int32 [S, M]
    window: int | None
