"""Repetition, frequency and presence penalties as a logits processor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.sampling.penalties import apply_penalties, begin_history, count_tokens, empty_slots
from ..host_copy import send_ints
from ..plan import RowStart


class Penalties:
    """Implements `LogitsProcessor` with one kernel for all rows.

    A row with penalties keeps a slot of `kernels.sampling.penalties` until the row starts again. Slots
    double when exhausted, so servers without penalties use no memory for them.
    """

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self._device = device
        self._slots = empty_slots(0, vocab_size, device)
        self._slot_of_row: dict[int, int] = {}
        self._free: list[int] = []
        self._applied = torch.empty(0, dtype=torch.int64)

    def start(self, start: RowStart) -> None:
        params = start.sampling
        if not self._free:
            self._grow()
        slot = self._slot_of_row[start.row] = self._free.pop()
        prompt, emitted = (
            torch.tensor(ids, dtype=torch.int64, device=self._device)
            for ids in (start.prompt_token_ids, start.emitted_token_ids)
        )
        begin_history(self._slots.history[slot], prompt, emitted)
        self._slots.repetition[slot] = params.repetition_penalty
        self._slots.frequency[slot] = params.frequency_penalty
        self._slots.presence[slot] = params.presence_penalty

    def stop(self, row: int) -> None:
        slot = self._slot_of_row.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def __contains__(self, row: int) -> bool:
        return row in self._slot_of_row

    def apply(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        # -1: a row without penalties, which kernels skip.
        self._applied = send_ints([self._slot_of_row.get(row, -1) for row in rows], self._device)
        apply_penalties(logits, self._applied, self._slots)

    def accept(self, rows: Sequence[int], tokens: torch.Tensor) -> None:
        count_tokens(self._slots.history, self._applied, tokens)

    def _grow(self) -> None:
        old = self._slots
        num_old, vocab_size = old.history.shape
        self._slots = empty_slots(max(4, 2 * num_old), vocab_size, self._device)
        for larger, smaller in zip(self._slots, old, strict=True):
            larger[:num_old] = smaller
        self._free.extend(range(num_old, len(self._slots.history)))
