"""What a scheduler tells its shards to run, and what they answer.

A plan is the same for every rank and holds nothing but integers (and, for sequences that are new, their sampling
parameters). Shards keep state by *row*: a row belongs to one sequence from its first step to its end, and holds its
block table, its sampling parameters and the last token sampled for it. A plan is therefore a diff: it names the rows
that run, and what changed. Plans are executed in the order in which they were submitted, so a plan may be made
before the tokens of the one before it are known: the token id DEVICE_TOKEN stands for "the last token sampled for
this row", which only the shard knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .protocol import SamplingParams

DEVICE_TOKEN = -1

Ints = NDArray[np.int32]


NO_INTS: Ints = np.empty(0, np.int32)


class RowStart(NamedTuple):
    """A row now belongs to a new sequence. Token ids are given only where `sampling.uses_history`."""

    row: int
    seed: int  # of this sample
    prompt_len: int
    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...] = ()
    emitted_token_ids: tuple[int, ...] = ()
    num_emitted: int = 0


@dataclass(frozen=True, slots=True)
class SeqSlice:
    """The part of one sequence that a step runs; a view on one entry of a StepPlan, for tests and debugging."""

    row: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]


class BlockCopy(NamedTuple):
    """Copy-on-write: block `source` is copied whole to `target`, in every layer, before the step runs."""

    source: int
    target: int


class StepPlan(NamedTuple):  # made twice a step, by the scheduler and by each rank: 0.4 us, a frozen dataclass 1.5
    """One step. S slices, T tokens, K tokens to sample. Slices of one token come first.

    There is no prefill or decode flag: a slice says how many tokens it runs.
    """

    step: int
    rows: Ints  # [S] row of each slice
    starts: Ints  # [S] tokens of the sequence that are in the KV cache before the step
    num_tokens: Ints  # [S]
    token_ids: Ints  # [T] slice after slice; DEVICE_TOKEN: the row's last sampled token
    sample_slices: Ints  # [K] the slice whose last hidden state is sampled from
    sample_rows: Ints  # [K] the row that receives the token (several rows of one slice: a fork)
    table_rows: Ints = NO_INTS  # [U] block_table[row, index] = block, applied before the step
    table_indices: Ints = NO_INTS  # [U]
    table_blocks: Ints = NO_INTS  # [U]
    copies: tuple[BlockCopy, ...] = ()
    row_starts: tuple[RowStart, ...] = ()
    # Prompt log-probabilities: slices whose every position is scored, and the token that follows each slice
    # (DEVICE_TOKEN where the slice ends the prompt: its last position is scored by sampling).
    scored_slices: Ints = NO_INTS
    scored_next: Ints = NO_INTS

    @property
    def num_slices(self) -> int:
        return len(self.rows)

    def slices(self) -> list[SeqSlice]:
        """The slices one by one."""
        ends = np.cumsum(self.num_tokens)
        return [
            SeqSlice(int(row), int(start), int(n), tuple(self.token_ids[end - n : end].tolist()))
            for row, start, n, end in zip(self.rows, self.starts, self.num_tokens, ends, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class LogprobArrays:
    """Log-probabilities of P tokens with the top N alternatives of each."""

    token_ids: Ints  # [P]
    logprobs: NDArray[np.float32]  # [P]
    ranks: Ints  # [P], 1 is the likeliest
    top_ids: Ints  # [P, N]
    top_logprobs: NDArray[np.float32]  # [P, N]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to the plan of the same step.

    `logprobs` covers the K samples when any of them asked for log-probabilities. `prompt_logprobs` has an entry for
    each of the plan's scored slices, of the tokens start+1 .. start+num_tokens (one fewer where scored_next is
    DEVICE_TOKEN). A `failed_rows` entry (row, message) marks a sequence whose sampling failed; its token is invalid.
    """

    step: int
    token_ids: Ints  # [K]
    logprobs: LogprobArrays | None = None
    prompt_logprobs: tuple[LogprobArrays, ...] = ()
    failed_rows: tuple[tuple[int, str], ...] = ()
