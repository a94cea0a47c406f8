"""A step plan while the scheduler writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..plan import NO_INTS, BlockCopy, Ints, RowStart, StepPlan

Rows = NDArray[np.intp]

_NO_ROWS = np.empty(0, np.intp)


class Chunk(NamedTuple):
    """A part of a context that is not decoded token by token: a prefill slice."""

    row: int
    start: int
    token_ids: Ints
    sampled_rows: tuple[int, ...]  # empty unless the chunk ends the context
    scored_next: int | None  # the token after the chunk, when its prompt log-probabilities are wanted


@dataclass(slots=True)
class PlanBuilder:
    """Decodes as arrays, prefill chunks one by one; `build` puts slices of one token first."""

    decode_rows: Rows = field(default_factory=lambda: _NO_ROWS)
    decode_starts: Ints = field(default_factory=lambda: NO_INTS)
    decode_tokens: Ints = field(default_factory=lambda: NO_INTS)
    chunks: list[Chunk] = field(default_factory=list)
    tables: list[tuple[Ints, Ints, Ints]] = field(default_factory=list)  # rows, indices, blocks
    copies: list[BlockCopy] = field(default_factory=list)
    row_starts: list[RowStart] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.chunks and not self.decode_rows.size

    def set_blocks(self, row: int, blocks: Ints) -> None:
        """Write the row's whole table."""
        count = len(blocks)
        self.tables.append((np.full(count, row, np.int32), np.arange(count, dtype=np.int32), blocks.astype(np.int32)))

    def build(self, step: int) -> tuple[StepPlan, list[Chunk]]:
        """The finished plan, and the chunks that it scores in the order of `scored_slices`."""
        table_rows, table_indices, table_blocks = (_concatenate([part[i] for part in self.tables]) for i in range(3))
        common = {
            "step": step,
            "table_rows": table_rows,
            "table_indices": table_indices,
            "table_blocks": table_blocks,
            "copies": tuple(self.copies),
            "row_starts": tuple(self.row_starts),
        }
        num_decodes = self.decode_rows.size
        rows = self.decode_rows.astype(np.int32)
        if not self.chunks:
            return StepPlan(
                rows=rows,
                starts=self.decode_starts,
                num_tokens=np.ones(num_decodes, np.int32),
                token_ids=self.decode_tokens,
                sample_slices=np.arange(num_decodes, dtype=np.int32),
                sample_rows=rows,
                **common,
            ), []
        chunks = sorted(self.chunks, key=lambda chunk: len(chunk.token_ids) > 1)
        samples = [(num_decodes + i, row) for i, chunk in enumerate(chunks) for row in chunk.sampled_rows]
        scored = [(num_decodes + i, c.scored_next, c) for i, c in enumerate(chunks) if c.scored_next is not None]
        plan = StepPlan(
            rows=_concatenate([rows, _ints([chunk.row for chunk in chunks])]),
            starts=_concatenate([self.decode_starts, _ints([chunk.start for chunk in chunks])]),
            num_tokens=_concatenate([np.ones(num_decodes, np.int32), _ints([len(c.token_ids) for c in chunks])]),
            token_ids=_concatenate([self.decode_tokens, *(chunk.token_ids for chunk in chunks)]),
            sample_slices=_concatenate([np.arange(num_decodes, dtype=np.int32), _ints([s for s, _ in samples])]),
            sample_rows=_concatenate([rows, _ints([row for _, row in samples])]),
            scored_slices=_ints([index for index, _, _ in scored]),
            scored_next=_ints([following for _, following, _ in scored]),
            **common,
        )
        return plan, [chunk for _, _, chunk in scored]


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, np.int32)


def _concatenate(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else NO_INTS
