"""The tensors of one step, built from a plan. Passed as arguments, never global.

Letters: T tokens, D decode slices, P prefill slices, M blocks of a table, K samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where each token's keys and values are, and what each query may attend to.

    Slices of one token ("decode") precede all others ("prefill"); token i is decode slice i. In a
    CUDA graph D and P are the graph's capacity: values on the device give the step's counts, and
    the rest is padding.
    """

    slot_mapping: torch.Tensor  # int64 [T], block_id * block_size + offset; -1 is padding
    decode_lens: torch.Tensor  # int32 [D] context lengths, this step's token included; 0 is padding
    decode_tables: torch.Tensor  # int32 [D, M]
    prefill_starts: torch.Tensor  # int32 [P + 1], first token of each slice in the step, then the end of the last
    prefill_lens: torch.Tensor  # int32 [P] context lengths, this step's tokens included
    prefill_tables: torch.Tensor  # int32 [P, M]


# Steps with up to so many decodes beside prefills have CUDA graph shapes of their own.
FEW_DECODES = 16


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Entries of each kind in a step's tensors: the step's own, or a CUDA graph's capacity.

    filtered: a row samples from part of the vocabulary, which is another program under tensor
    parallelism.
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
    sample_indices: torch.Tensor  # int64 [K], tokens whose hidden states are sampled
    sample_rows: torch.Tensor  # int64 [K], the rows that receive the tokens
    sample_positions: torch.Tensor  # int64 [K], the tokens' positions in their sequences


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """Results of one forward over T tokens, K sampled. Stages before the last have K = 0."""

    hidden: torch.Tensor | None  # [T, hidden]; None, like logits, after a CUDA graph, which may reuse their memory
    logits: torch.Tensor | None  # [K, size], this rank's slice of the vocabulary
    sampled: torch.Tensor  # [K, hidden], the hidden states that were sampled from
    rows: torch.Tensor  # int64 [K]
    tokens: torch.Tensor  # int64 [K], -1 where no token could be sampled
