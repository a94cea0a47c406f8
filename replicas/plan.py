"""Step plans, from the scheduler to its ranks, and step results, back.

Every rank receives the same plan. It is a diff: the rows that run and what changed. The scheduler plans a step before
it has the tokens of the step before: DEVICE_TOKEN replaces a row's last sampled token, which only the ranks hold.

A sequence keeps one row from its first step to its end. State per row:

    owner                       state                                            reset by
    engine  SequenceTable       token ids, lengths, limits, block table, epoch   `assign` (and `free`: the epoch)
    rank    RowState            block table, last token, sampling parameters     RowStart; last token: each sample
    rank    Sampler             logits processors, penalties, log-prob. count    RowStart
    rank    Runner              number of prompt log-probabilities               RowStart
    rank 0  StageExchange       step that last sampled the row (pipelines)       each plan that samples the row

Ranks receive no end of a sequence: the next RowStart resets the row. A second kind of state per sequence:
docs/adr/0018-state-beside-kv-blocks.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

from .protocol import SamplingParams

DEVICE_TOKEN = -1

Ints = NDArray[np.int32]


NO_INTS: Ints = np.empty(0, np.int32)


class RowStart(NamedTuple):
    """A row's new sequence. Token ids are given only where `sampling.uses_history`."""

    row: int
    seed: int  # of this sample
    prompt_len: int
    sampling: SamplingParams
    prompt_token_ids: tuple[int, ...] = ()
    emitted_token_ids: tuple[int, ...] = ()
    num_emitted: int = 0


@dataclass(frozen=True, slots=True)
class SeqSlice:
    """One slice, for tests and debugging."""

    row: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...]


class BlockCopy(NamedTuple):
    """Copy-on-write: copy block `source` to `target` in every layer, before the step runs."""

    source: int
    target: int


class StepPlan(NamedTuple):  # made twice a step, by the scheduler and by each rank: 0.4 us, a frozen dataclass 1.5
    """One step. Slices of one token come first.

    Arrays are annotated with the letter of their length: S slices, T tokens, K samples, U block
    table updates, P scored slices, D either 0 or K. Step frames and packed plans follow from
    PLAN_ARRAYS.

    Sample k's slice ends with `num_drafts[k]` draft tokens. The rank samples after the token
    before the drafts and after each draft. It accepts drafts as long as they equal the samples, and
    returns 1 to num_drafts[k] + 1 samples (StepResult.counts). The row is in no plan before that result.
    """

    step: int
    rows: Annotated[Ints, "S"]  # row of each slice
    starts: Annotated[Ints, "S"]  # tokens in the KV cache before the step
    num_tokens: Annotated[Ints, "S"]
    token_ids: Annotated[Ints, "T"]  # slice after slice; DEVICE_TOKEN: the row's last sampled token
    sample_slices: Annotated[Ints, "K"]  # whose last hidden state is sampled from
    sample_rows: Annotated[Ints, "K"]  # that receive the tokens (several of one slice: a fork)
    table_rows: Annotated[Ints, "U"] = NO_INTS  # block_table[row, index] = block, applied before the step
    table_indices: Annotated[Ints, "U"] = NO_INTS
    table_blocks: Annotated[Ints, "U"] = NO_INTS
    # Prompt log-probabilities: wholly scored slices, and the token after each (DEVICE_TOKEN where
    # it ends the prompt: sampling scores its last position).
    scored_slices: Annotated[Ints, "P"] = NO_INTS
    scored_next: Annotated[Ints, "P"] = NO_INTS
    num_drafts: Annotated[Ints, "D"] = NO_INTS  # per sample; empty: none
    copies: tuple[BlockCopy, ...] = ()
    row_starts: tuple[RowStart, ...] = ()

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
    """Log-probabilities of P tokens with their top N alternatives."""

    token_ids: Ints  # [P]
    logprobs: NDArray[np.float32]  # [P]
    ranks: Ints  # [P], 1 is the most probable token
    top_ids: Ints  # [P, N]
    top_logprobs: NDArray[np.float32]  # [P, N]


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a plan.

    `logprobs` covers the sampled tokens if any sample asked for them. `prompt_logprobs` has an
    entry per scored slice, of the tokens start + 1 .. start + num_tokens (one fewer where
    scored_next is DEVICE_TOKEN). `failed_rows`: (row, message) where sampling failed; the token
    is invalid.
    """

    step: int
    token_ids: Annotated[Ints, "N"]  # [K], or sample after sample with `counts`
    logprobs: LogprobArrays | None = None
    prompt_logprobs: tuple[LogprobArrays, ...] = ()
    failed_rows: tuple[tuple[int, str], ...] = ()
    counts: Annotated[Ints, "C"] = field(
        default_factory=lambda: NO_INTS
    )  # [K] tokens of each sample, at least 1; empty: one each


def _arrays(message: Any) -> dict[str, str]:
    hints = get_type_hints(message, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


PLAN_ARRAYS: dict[str, str] = _arrays(StepPlan)
RESULT_ARRAYS: dict[str, str] = _arrays(StepResult)
