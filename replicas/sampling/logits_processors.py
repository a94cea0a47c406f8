"""Logits processors change a row's logits before sampling.

Rows without any are sampled in the CUDA graph. Others are resampled outside of it, from a copy that
processors change in the order of `processor_table.LOGITS_PROCESSORS`. A new one is a class and an
entry there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeAlias, TypeVar

import torch

from ..plan import RowStart

FORBIDDEN = float("-inf")

State = TypeVar("State")


class LogitsProcessor(Protocol):
    """One feature, for all rows of a rank.

    Logits cover all V tokens, even if ranks hold slices. Every rank runs the same processors on
    the same bits, so they must be deterministic and must not communicate.

    A token is sampled before the host reads the previous one. Keep state on the device, or set
    `needs_last_token` in the table's entry and implement `LastTokenReader`.
    """

    def start(self, start: RowStart) -> None:
        """Process a row for a new sequence, perhaps a fork. `stop` has been called if the row was processed.

        A sequence resumed after preemption keeps its row. Token ids require
        `SamplingParams.uses_history`; emitted ones come from a replica whose request this
        one continues.
        """
        ...

    def stop(self, row: int) -> None:
        """Drop the row's state, if it has any."""
        ...

    def __contains__(self, row: int) -> bool: ...

    def apply(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        """Change float32 logits [K, V] of processed rows in place. positions: of the sampled tokens."""
        ...

    def accept(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        """Receive int64 [K] on the device: tokens sampled after the last `apply`, -1 if none."""
        ...


# Arguments: vocab_size, eos_token_ids, device.
ProcessorClass: TypeAlias = Callable[[int, tuple[int, ...], torch.device], LogitsProcessor]


class LastTokenReader(LogitsProcessor, Protocol):
    """A processor whose entry of the table sets `needs_last_token`; its rows have one step in flight at most."""

    def observe(self, row: int, token_id: int) -> None:
        """Receive the row's last token on the host, once, before the next is sampled."""
        ...


class RowProcessor(Generic[State]):
    """Base of processors that change one row at a time, with a state per row."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.vocab_size, self.eos_token_ids, self.device = vocab_size, eos_token_ids, device
        self.states: dict[int, State] = {}

    def make_state(self, start: RowStart) -> State:
        raise NotImplementedError

    def apply_row(self, state: State, logits: torch.Tensor, position: int) -> None:
        raise NotImplementedError

    def accept_row(self, row: int, token: torch.Tensor) -> None:
        """Receive the sampled token, an int64 scalar on the device."""

    def start(self, start: RowStart) -> None:
        self.states[start.row] = self.make_state(start)

    def stop(self, row: int) -> None:
        self.states.pop(row, None)

    def __contains__(self, row: int) -> bool:
        return row in self.states

    def apply(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            if row in self.states:
                self.apply_row(self.states[row], logits[i], position)

    def accept(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        for i, row in enumerate(rows):
            if row in self.states:
                self.accept_row(row, tokens[i])

    def ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


class LogitBias(RowProcessor[tuple[torch.Tensor, torch.Tensor]]):
    """`logit_bias`; state: token ids and the values added to their logits."""

    def make_state(self, start: RowStart) -> tuple[torch.Tensor, torch.Tensor]:
        ids, bias = zip(*start.sampling.logit_bias, strict=True)
        return self.ints(ids), torch.tensor(bias, dtype=torch.float32, device=self.device)

    def apply_row(self, state: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor, position: int) -> None:
        logits.index_add_(0, *state)


class AllowedTokens(RowProcessor[torch.Tensor]):
    """`allowed_token_ids`; state: bool mask [V] of all other tokens."""

    def make_state(self, start: RowStart) -> torch.Tensor:
        forbidden = torch.ones(self.vocab_size, dtype=torch.bool, device=self.device)
        forbidden[self.ints(start.sampling.allowed_token_ids)] = False
        return forbidden

    def apply_row(self, state: torch.Tensor, logits: torch.Tensor, position: int) -> None:
        logits.masked_fill_(state, FORBIDDEN)


class BadWords(RowProcessor[tuple[list[tuple[torch.Tensor, int]], torch.Tensor]]):
    """`bad_words`; forbids the last token of a word after its other tokens.

    State: each word as (tokens before the last, last token), and as many recent tokens as the
    longest word needs; -1, equal to no token, pads shorter sequences. Last tokens of words are
    on the host: indexing with one on the device would wait for it.
    """

    def make_state(self, start: RowStart) -> tuple[list[tuple[torch.Tensor, int]], torch.Tensor]:
        words = start.sampling.bad_words
        longest = max(len(word) for word in words) - 1
        known = (start.prompt_token_ids + start.emitted_token_ids)[-longest:] if longest else ()
        tail = self.ints((-1,) * (longest - len(known)) + known)
        return [(self.ints(word[:-1]), word[-1]) for word in words], tail

    def apply_row(
        self, state: tuple[list[tuple[torch.Tensor, int]], torch.Tensor], logits: torch.Tensor, position: int
    ) -> None:
        words, tail = state
        for prefix, last in words:
            completes = (tail[len(tail) - len(prefix) :] == prefix).all()
            logits[last] = torch.where(completes, FORBIDDEN, logits[last])

    def accept_row(self, row: int, token: torch.Tensor) -> None:
        words, tail = self.states[row]
        if len(tail):
            self.states[row] = words, torch.cat((tail[1:], token.reshape(1)))


class MinTokens(RowProcessor[tuple[torch.Tensor, int]]):
    """`min_tokens`; forbids end and stop tokens (first state) before a position (second).

    Also with `ignore_eos`, which otherwise allows sampling end tokens without ending.
    """

    def make_state(self, start: RowStart) -> tuple[torch.Tensor, int]:
        params = start.sampling
        ends = (*self.eos_token_ids, *params.stop_token_ids)
        return self.ints(ends), start.prompt_len + params.min_tokens

    def apply_row(self, state: tuple[torch.Tensor, int], logits: torch.Tensor, position: int) -> None:
        ends, first_position = state
        if position < first_position and len(ends):
            logits[ends] = FORBIDDEN
