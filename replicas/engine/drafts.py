"""Draft tokens: several tokens of a row in one step.

StepPlan.num_drafts and StepResult.counts are the contract with the ranks. A request with drafts has
one step in flight. Proposers: speculative decoding, jump-forward decoding.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from ..plan import DEVICE_TOKEN, Ints, StepResult
from .block_pool import BlockPool
from .plan_builder import Chunk, PlanBuilder, Rows
from .sequence import Phase, Sequence, SequenceTable, true_rows
from .step_outcome import StepInFlight


class DraftProposer(Protocol):
    """Proposes tokens that the model is likely to sample next."""

    def propose(self, sequence: Sequence, context: Ints, max_tokens: int) -> Ints:
        """At most `max_tokens` int32 tokens after `context`. Empty: a plain decode."""
        ...


def add_drafts(
    proposer: DraftProposer, builder: PlanBuilder, table: SequenceTable, pool: BlockPool, budget: int
) -> int:
    """Replace decodes by slices with drafts, within budget and blocks; returns the number of drafts."""
    block_size, num_drafts, plain = pool.block_size, 0, np.ones(builder.decode_rows.size, bool)
    for i in true_rows(builder.decode_tokens != DEVICE_TOKEN).tolist():
        row, start = int(builder.decode_rows[i]), int(builder.decode_starts[i])
        num_blocks = int(table.num_blocks[row])
        limit = min(
            budget - num_drafts,
            int(table.max_length[row]) - start - 2,  # one more is sampled if all are accepted
            (num_blocks + pool.num_free) * block_size - start - 1,
        )
        if limit <= 0:
            continue
        drafts = proposer.propose(table.sequences.item(row), table.context(row), limit)[:limit]
        count = len(drafts)
        if not count:
            continue
        num_new = -(-(start + 1 + count) // block_size) - num_blocks
        if num_new > 0:
            blocks, indices = pool.allocate(num_new), np.arange(num_blocks, num_blocks + num_new, dtype=np.int32)
            table.set_blocks(row, np.concatenate([table.block_table(row), blocks]))
            builder.tables.append((np.full(num_new, row, np.int32), indices, blocks))
        tokens = np.concatenate([builder.decode_tokens[i : i + 1], drafts]).astype(np.int32)
        builder.chunks.append(Chunk(row, start, tokens, (row,), None, count))
        table.computed[row] += count
        table.length[row] += count
        table.decoding[row] = False  # until the result says where the row continues
        plain[i] = False
        num_drafts += count
    builder.decode_rows, builder.decode_starts = builder.decode_rows[plain], builder.decode_starts[plain]
    builder.decode_tokens = builder.decode_tokens[plain]
    return num_drafts


def accepted(table: SequenceTable, step: StepInFlight, result: StepResult) -> tuple[Rows, Rows, Ints]:
    """The tokens to keep: their indices in the result, rows and positions.

    Drops tokens of ended sequences, and those after a stop token or the last allowed one.
    """
    counts, token_ids = result.counts, result.token_ids
    firsts = np.cumsum(counts) - counts
    owners = np.repeat(np.arange(len(counts)), counts)
    rows = step.sample_rows[owners]
    positions = table.known[rows] + np.arange(len(owners), dtype=np.int32) - firsts[owners].astype(np.int32)
    stopped = table.stopped(rows, token_ids) & (positions + 1 >= table.min_length[rows])
    ends = stopped | (positions + 1 >= table.max_length[rows])
    ends_before = np.cumsum(ends) - ends
    current = table.epoch[rows] == step.sample_epochs[owners]
    kept = true_rows(current & (ends_before == ends_before[firsts[owners]]))
    return kept, rows[kept], positions[kept]


def roll_back(table: SequenceTable, pool: BlockPool, step: StepInFlight) -> None:
    """Continue rows after their accepted tokens, and free the blocks beyond."""
    for row in step.draft_rows:
        if table.epoch[row] != step.chunk_epochs[row]:
            continue
        known = int(table.known[row])
        table.length[row] = known
        if table.sequences.item(row).phase is not Phase.DECODE:  # preempted: its blocks are free already
            continue
        table.computed[row] = known - 1
        table.decoding[row] = True
        blocks = table.block_table(row).copy()
        num_kept = -(-(known - 1) // pool.block_size)
        pool.release(blocks[num_kept:])
        table.set_blocks(row, blocks[:num_kept])
