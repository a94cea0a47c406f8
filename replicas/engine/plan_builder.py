"""Builds a step plan from the parts that the scheduler adds."""

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
    """A slice planned by itself: a prefill chunk, or a decode with drafts."""

    row: int
    start: int
    token_ids: Ints
    sampled_rows: tuple[int, ...]  # empty unless the chunk ends the context
    scored_next: int | None  # the token after the chunk, if it is scored
    num_drafts: int = 0  # tokens at its end that are drafts


@dataclass(slots=True)
class PlanBuilder:
    """Decodes are arrays, chunks are objects; `build` puts slices of one token first."""

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
        """Write the row's whole block table."""
        count = len(blocks)
        self.tables.append((np.full(count, row, np.int32), np.arange(count, dtype=np.int32), blocks.astype(np.int32)))

    def build(self, step: int) -> tuple[StepPlan, list[Chunk]]:
        """The plan, and its scored chunks in the order of `scored_slices`."""
        num_decodes = self.decode_rows.size
        decode_rows = self.decode_rows.astype(np.int32)
        decodes = StepPlan(
            step=step,
            rows=decode_rows,
            starts=self.decode_starts,
            num_tokens=np.ones(num_decodes, np.int32),
            token_ids=self.decode_tokens,
            sample_slices=np.arange(num_decodes, dtype=np.int32),
            sample_rows=decode_rows,
            table_rows=_concatenate([rows for rows, _, _ in self.tables]),
            table_indices=_concatenate([indices for _, indices, _ in self.tables]),
            table_blocks=_concatenate([blocks for _, _, blocks in self.tables]),
            copies=tuple(self.copies),
            row_starts=tuple(self.row_starts),
        )
        return self._with_chunks(decodes) if self.chunks else (decodes, [])

    def _with_chunks(self, decodes: StepPlan) -> tuple[StepPlan, list[Chunk]]:
        chunks = sorted(self.chunks, key=lambda chunk: len(chunk.token_ids) > 1)
        slices = list(enumerate(chunks, decodes.num_slices))
        samples = [(index, row, chunk.num_drafts) for index, chunk in slices for row in chunk.sampled_rows]
        scored = [(index, chunk.scored_next, chunk) for index, chunk in slices if chunk.scored_next is not None]
        num_drafts = _ints([count for _, _, count in samples])
        plan = decodes._replace(
            rows=_concatenate([decodes.rows, _ints([chunk.row for chunk in chunks])]),
            starts=_concatenate([decodes.starts, _ints([chunk.start for chunk in chunks])]),
            num_tokens=_concatenate([decodes.num_tokens, _ints([len(chunk.token_ids) for chunk in chunks])]),
            token_ids=_concatenate([decodes.token_ids, *(chunk.token_ids for chunk in chunks)]),
            sample_slices=_concatenate([decodes.sample_slices, _ints([index for index, _, _ in samples])]),
            sample_rows=_concatenate([decodes.sample_rows, _ints([row for _, row, _ in samples])]),
            scored_slices=_ints([index for index, _, _ in scored]),
            scored_next=_ints([following for _, following, _ in scored]),
            num_drafts=_concatenate([np.zeros_like(decodes.rows), num_drafts]) if num_drafts.any() else NO_INTS,
        )
        return plan, [chunk for _, _, chunk in scored]


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, np.int32)


def _concatenate(parts: Sequence[Ints]) -> Ints:
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else NO_INTS
