"""The tensors of one step, as a rank builds them from a plan. Passed as arguments, never global.

Letters: S slices, T tokens, K samples, B blocks a sequence may have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each token's keys and values live, and what each query may see. Slices of one token come first."""

    cu_seqlens_q: torch.Tensor  # int32 [S+1]
    context_lens: torch.Tensor  # int32 [S], with this step's tokens
    block_tables: torch.Tensor  # int32 [S, ceil(max_context_len / block_size)], unused entries 0
    slot_mapping: torch.Tensor  # int64 [T], block_id * block_size + offset
    num_single: int  # leading slices of exactly one token
    max_query_len: int
    max_context_len: int
    query_lens_host: tuple[int, ...]  # [S], of the slices after the first num_single
    context_lens_host: tuple[int, ...]  # [S], likewise


@dataclass(frozen=True, slots=True)
class InputBatch:
    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    attention: AttentionMetadata
    sample_indices: torch.Tensor  # int64 [K], token indices whose hidden states are sampled from
