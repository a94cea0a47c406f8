"""Which rows have penalties, and the histories that penalties count in: memory only for those that ask for it."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ...kernels.sampling.penalties import apply_penalties, begin_history, count_tokens, empty_slots
from ..host_copy import send_ints
from ..plan import RowStart


class PenaltyRows:
    """A slot of `kernels.penalties` for each row whose sequence has penalties.

    Slots double in number when they run out; a row keeps its slot until it is started again.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._slots = empty_slots(0, vocab_size, device)
        self._slot_of_row: dict[int, int] = {}
        self._free: list[int] = []

    def start(self, start: RowStart) -> None:
        """Begin a sequence in a row; what the row held before is forgotten."""
        held = self._slot_of_row.pop(start.row, None)
        if held is not None:
            self._free.append(held)
        params = start.sampling
        if not (params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0):
            return
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

    def __contains__(self, row: int) -> bool:
        return row in self._slot_of_row

    def __bool__(self) -> bool:
        return bool(self._slot_of_row)

    def slots(self, rows: Collection[int]) -> torch.Tensor:
        """Slots of rows, int64 [K] on the device, -1 for a row without penalties."""
        return send_ints([self._slot_of_row.get(row, -1) for row in rows], self._device)

    def apply(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Change float32 `logits` [K, V] in place."""
        apply_penalties(logits, slots, self._slots)

    def count(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Note tokens int64 [K]; -1 is none."""
        count_tokens(self._slots.history, slots, tokens)

    def _grow(self) -> None:
        old = self._slots
        num_old, vocab_size = old.history.shape
        self._slots = empty_slots(max(4, 2 * num_old), vocab_size, self._device)
        for larger, smaller in zip(self._slots, old, strict=True):
            larger[:num_old] = smaller
        self._free.extend(range(num_old, len(self._slots.history)))
