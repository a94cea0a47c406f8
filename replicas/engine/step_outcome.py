"""A step under way, and what it brought."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..plan import Ints
from .plan_builder import Chunk, Rows
from .sequence import FinishedSequence, Sequence


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """What the scheduler must remember of a plan until its result comes: whose the samples and chunks were."""

    step: int
    sample_rows: Rows
    sample_epochs: Ints
    chunk_epochs: dict[int, int]  # by row
    scored: list[Chunk]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a result brought: sequence `sequences[i]` got token `token_ids[i]`, sample `samples[i]` of the plan.

    It is sample `sample_numbers[i]` of request `request_ids[i]`. `firsts` are those i where the token was the first
    one; `endings` is by i where it was the last one; `failures` ended without a token.
    """

    samples: Rows
    sequences: NDArray[np.object_]
    request_ids: NDArray[np.object_]
    sample_numbers: Ints
    token_ids: Ints
    firsts: Rows
    endings: dict[int, FinishedSequence]
    failures: list[FinishedSequence]
    scored: list[tuple[Sequence, int] | None]  # (sequence, start) of each scored slice, None when it has ended
