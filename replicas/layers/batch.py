"""The tensors of one step, as a rank builds them from a plan. Passed as arguments, never global.

Letters: T tokens, D decode slices, P prefill slices, M blocks a table has room for, K samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each token's keys and values live, and what each query may see.

    Slices of one token ("decode") stand before all others ("prefill"), token i of the step being decode slice i. On
    the CPU D and P are what the step has. In a CUDA graph they are what the graph has room for: there the values on
    the device say what the step has, and entries beyond it are padding.
    """

    slot_mapping: torch.Tensor  # int64 [T], block_id * block_size + offset; -1 is padding, which nobody writes
    decode_lens: torch.Tensor  # int32 [D] context lengths, this step's token included; 0 is padding
    decode_tables: torch.Tensor  # int32 [D, M]
    prefill_starts: torch.Tensor  # int32 [P + 1], first token of each slice in the step, then the end of the last
    prefill_lens: torch.Tensor  # int32 [P] context lengths, this step's tokens included
    prefill_tables: torch.Tensor  # int32 [P, M]


# Up to so many decodes of a step beside prefills are few: CUDA graphs keep rooms for them of their own.
FEW_DECODES = 16


@dataclass(frozen=True, slots=True)
class GraphShape:
    """How many entries of each kind a step's tensors hold: what the step has or, in a CUDA graph, more.

    filtered: with tensor parallelism, a row is sampled from less than the whole vocabulary: that is another program.
    """

    tokens: int  # T
    decodes: int  # D
    prefills: int  # P
    samples: int  # K
    filtered: bool = False

    def holds(self, other: GraphShape) -> bool:
        """Whether a step of the size of `other` fits."""
        return (
            other.tokens <= self.tokens
            and other.decodes <= self.decodes
            and other.prefills <= self.prefills
            and other.samples <= self.samples
            and other.filtered == self.filtered
        )


@dataclass(frozen=True, slots=True)
class InputBatch:
    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    attention: AttentionMetadata
    sample_indices: torch.Tensor  # int64 [K], token indices whose hidden states are sampled from
    sample_rows: torch.Tensor  # int64 [K], the rows that receive the tokens
    sample_positions: torch.Tensor  # int64 [K], where in their sequences the tokens will stand


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Results of one forward over T tokens, K of them sampled from. Stages before the last have K = 0."""

    hidden: torch.Tensor | None  # [T, hidden]; None, like logits, after a CUDA graph, which may reuse their memory
    logits: torch.Tensor | None  # [K, size], this rank's slice of the vocabulary
    sampled: torch.Tensor  # [K, hidden], the hidden states that were sampled from
    rows: torch.Tensor  # int64 [K]
    tokens: torch.Tensor  # int64 [K], -1 where no token could be sampled
