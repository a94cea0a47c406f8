"""A step in flight, and its outcome."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..plan import Ints, StepPlan
from .plan_builder import Chunk, Rows
from .sequence import FinishedSequence, Sequence


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A plan's sequences, by row and epoch, until its result comes."""

    step: int
    sample_rows: Rows
    sample_epochs: Ints
    chunk_epochs: dict[int, int]  # by row
    scored: list[Chunk]
    draft_rows: list[int]  # whose slices end with draft tokens

    @classmethod
    def of(cls, plan: StepPlan, chunks: list[Chunk], scored: list[Chunk], epochs: Ints) -> StepInFlight:
        """The sequences in the plan's rows now."""
        sample_rows = plan.sample_rows.astype(np.intp)
        chunk_epochs = {chunk.row: int(epochs[chunk.row]) for chunk in chunks}
        draft_rows = [chunk.row for chunk in chunks if chunk.num_drafts]
        return cls(plan.step, sample_rows, epochs[sample_rows], chunk_epochs, scored, draft_rows)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The new tokens of a result: `sequences[i]` got `token_ids[i]`, at index `samples[i]` of
    the result.

    It is sample `sample_numbers[i]` of request `request_ids[i]`; one with several tokens is
    repeated. `firsts` holds the i of first tokens, `finished` maps those of last ones.
    `failures` ended without a token.
    """

    samples: Rows
    sequences: NDArray[np.object_]
    request_ids: NDArray[np.object_]
    sample_numbers: Ints
    token_ids: Ints
    firsts: Rows
    finished: dict[int, FinishedSequence]
    failures: list[FinishedSequence]
    scored: list[tuple[Sequence, int] | None]  # (sequence, start) of each scored slice; None: it has ended
