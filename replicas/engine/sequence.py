"""Sequences as the scheduler keeps them: a Python object for rare state, a row of arrays for each step's state.

The token ranges of one row, in positions of its sequence:

    0          context_length                known            length
    |--------------|---------------------------|----------------|......... max_length
    | prompt and   | sampled and read back     | to be sampled  |
    | emitted      |                           | in flight      |
    |---------------- computed ---------------------------->|
      in the KV cache once all submitted steps have run: of a decoding row, all but the token at length - 1

docs/one-step.md has an example. The result of a slice with drafts moves `length` and `computed` back to the accepted
ones (drafts.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..config import ModelFacts
from ..plan import Ints, RowStart
from ..protocol import FinishReason, Logprob, Request

_NO_LIMIT = np.iinfo(np.int32).max

SchedulingKey = tuple[int, int, int]  # (priority, arrival, sample): the lower runs first and is preempted last


class Phase(Enum):
    """Samples but the leader wait until it has run the prompt."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class RequestState:
    """One accepted request, until its last sequence ends."""

    request: Request
    arrival: int
    context: Ints  # [prompt + emitted] token ids
    sequences: list[Sequence] = field(default_factory=list)
    num_open: int = 0
    max_steps_in_flight: int | None = None  # of each sequence; None: no limit
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at first admission
    num_copied: int = 0
    prompt_logprobs: list[Logprob | None] | None = None  # by position

    @property
    def leader(self) -> Sequence:
        """The sequence that runs the prompt; the others fork from it."""
        return self.sequences[0]

    @property
    def key(self) -> SchedulingKey:
        return self.leader.key


@dataclass(slots=True, eq=False)
class Sequence:
    """One token stream of a request."""

    state: RequestState
    sample: int
    key: SchedulingKey
    request_id: str
    phase: Phase = Phase.WAITING
    row: int = -1
    started: bool = False  # RowStart sent
    hashes: list[bytes] = field(default_factory=list)  # of its leading full blocks
    num_registered: int = 0  # leading blocks in the prefix cache

    def row_start(self) -> RowStart:
        """The sequence's part of the plan that first runs it."""
        request = self.state.request
        history = request.sampling.uses_history
        return RowStart(
            row=self.row,
            seed=request.sample_seed(self.sample),
            prompt_len=len(request.prompt_token_ids),
            sampling=request.sampling,
            prompt_token_ids=request.prompt_token_ids if history else (),
            emitted_token_ids=request.emitted_token_ids if history else (),
            num_emitted=len(request.emitted_token_ids),
        )


class FinishedSequence(NamedTuple):
    """A sequence that has ended, and why."""

    sequence: Sequence
    reason: FinishReason
    stop_reason: int | None = None
    error: str | None = None


def true_rows(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """np.flatnonzero without its 0.7 us of Python, six times a step."""
    return mask.nonzero()[0]


class SequenceTable:
    """State of each step: a row per admitted sequence, an array per field. The module draws the lengths."""

    def __init__(
        self, num_rows: int, max_model_len: int, block_size: int, facts: ModelFacts, max_in_flight: int | None = None
    ) -> None:
        self._default_in_flight = _NO_LIMIT if max_in_flight is None else max_in_flight
        self.limits_in_flight = max_in_flight is not None  # whether any row may have one
        max_blocks = -(-max_model_len // block_size)
        self.tokens: NDArray[np.int32] = np.zeros((num_rows, max_model_len), np.int32)
        self.context_length: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.known: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.length: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.computed: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.in_flight: NDArray[np.int32] = np.zeros(num_rows, np.int32)  # submitted steps that sample the row
        self.max_in_flight: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.min_length: NDArray[np.int32] = np.zeros(num_rows, np.int32)  # below it no token stops
        self.max_length: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.decoding: NDArray[np.bool_] = np.zeros(num_rows, bool)
        self.micro_batch: NDArray[np.intp] = np.zeros(num_rows, np.intp)  # of a decoding row of a pipeline
        self.is_eos: NDArray[np.bool_] = np.zeros(facts.vocab_size, bool)  # by token id, not by row
        self.is_eos[[token for token in facts.eos_token_ids if token < facts.vocab_size]] = True
        self.stops_at_eos: NDArray[np.bool_] = np.zeros(num_rows, bool)
        self.stop_ids: NDArray[np.int32] = np.full((num_rows, 1), -1, np.int32)  # -1: none
        self.has_stop_ids: NDArray[np.bool_] = np.zeros(num_rows, bool)
        self.epoch: NDArray[np.int32] = np.zeros(num_rows, np.int32)  # sequences that have left the row
        self.blocks: NDArray[np.int32] = np.zeros((num_rows, max_blocks), np.int32)
        self.num_blocks: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self.last_block: NDArray[np.int32] = np.zeros(num_rows, np.int32)  # blocks[row, num_blocks[row] - 1]
        self.sequences: NDArray[np.object_] = np.full(num_rows, None, object)
        self.request_ids: NDArray[np.object_] = np.full(num_rows, None, object)
        self.sample_numbers: NDArray[np.int32] = np.zeros(num_rows, np.int32)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def assign(self, sequence: Sequence) -> None:
        """Assign a row to the sequence until it ends."""
        request, context = sequence.state.request, sequence.state.context
        sampling, prompt_len = request.sampling, len(request.prompt_token_ids)
        row = sequence.row = self._free_rows.pop()
        self.sequences[row] = sequence
        self.request_ids[row], self.sample_numbers[row] = sequence.request_id, sequence.sample
        self.tokens[row, : len(context)] = context
        self.context_length[row] = self.known[row] = self.length[row] = len(context)
        self.computed[row] = self.in_flight[row] = self.num_blocks[row] = 0
        self.min_length[row] = prompt_len + sampling.min_tokens
        self.max_length[row] = prompt_len + sampling.max_tokens
        self.stops_at_eos[row] = not sampling.ignore_eos
        self.max_in_flight[row] = self._default_in_flight
        limit = sequence.state.max_steps_in_flight
        if limit is not None:
            self.max_in_flight[row] = min(limit, self._default_in_flight)
            self.limits_in_flight = True
        self._set_stop_ids(row, sampling.stop_token_ids)

    def free(self, row: int) -> None:
        """Free the row. The new epoch voids its steps in flight."""
        self.epoch[row] += 1
        self.sequences[row] = None
        self.decoding[row] = False
        self._free_rows.append(row)

    def stopped(self, rows: NDArray[np.intp], token_ids: Ints) -> NDArray[np.bool_]:
        """Which rows sampled end-of-sequence or one of their stop tokens."""
        stopped = self.is_eos[token_ids] & self.stops_at_eos[rows]
        with_stops = true_rows(self.has_stop_ids[rows])
        if with_stops.size:
            stopped[with_stops] |= (self.stop_ids[rows[with_stops]] == token_ids[with_stops, None]).any(axis=1)
        return stopped

    def context(self, row: int) -> Ints:
        """Known token ids of the row."""
        return self.tokens[row, : self.known[row]]

    def block_table(self, row: int) -> Ints:
        """Blocks of the row, in order."""
        return self.blocks[row, : self.num_blocks[row]]

    def set_blocks(self, row: int, blocks: Ints) -> None:
        """Replace the row's whole block table."""
        count = len(blocks)
        self.blocks[row, :count] = blocks
        self.num_blocks[row] = count
        self.last_block[row] = blocks[-1] if count else 0

    def _set_stop_ids(self, row: int, stop_ids: tuple[int, ...]) -> None:
        width = self.stop_ids.shape[1]
        if len(stop_ids) > width:
            grown = np.full((len(self.stop_ids), max(len(stop_ids), 2 * width)), -1, np.int32)
            grown[:, :width] = self.stop_ids
            self.stop_ids = grown
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids
        self.has_stop_ids[row] = bool(stop_ids)
