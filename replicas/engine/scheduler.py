"""Decides what each step runs: continuous batching over one token budget, ahead of the tokens it waits for.

A step takes, in this order:

1. every decoding sequence, one token each;
2. the next chunk of every prompt that is being prefilled, first in rank first;
3. preempted and new sequences, by (priority, arrival), as far as rows, blocks and budget go.

A context gets all of its blocks when it is admitted, so that only decoding can run short of blocks. Then the last in
rank loses its blocks, keeps its row and the tokens it has, and is prefilled again when its turn comes. The first in
rank is never preempted for another, so there is always progress. With pipeline stages a step decodes the sequences of
one lane (lanes.py).

Plans run in the order in which they were made. Hence blocks that a sequence gives up may be given away by the next
plan although steps in flight still write to them, and the blocks of a prefilled prompt may be reused by the next
plan although no shard has run them yet.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from ..config import ModelFacts, ResolvedConfig
from ..plan import DEVICE_TOKEN, BlockCopy, Ints, StepPlan, StepResult
from ..protocol import BlockReport, FinishReason, ReplicaLoad, Request
from .block_pool import BlockPool, extend_digests
from .counters import Counters
from .micro_batches import MicroBatches
from .plan_builder import Chunk, PlanBuilder, Rows
from .sequence import FinishedSequence, Phase, RequestState, Sequence, SequenceTable, true_rows
from .step_outcome import StepInFlight, StepOutcome
from .waiting_queue import WaitingQueue


class Scheduler:
    """Plans steps and takes in their results. Owns every sequence and the block pool; not thread-safe."""

    def __init__(self, config: ResolvedConfig, facts: ModelFacts, num_blocks: int) -> None:
        block_size, max_model_len = config.cache.block_size, config.model.max_model_len
        num_stages, in_flight = config.parallel.pipeline_parallel_size, config.scheduler.max_steps_in_flight
        self.pool = BlockPool(num_blocks, block_size)
        self.table = SequenceTable(config.scheduler.max_num_seqs, max_model_len, block_size, facts)
        self.counters = Counters()
        self._lanes = MicroBatches(num_stages, self.table, in_flight) if num_stages > 1 else None
        self._shift = block_size.bit_length() - 1
        self._budget = config.scheduler.max_num_batched_tokens
        self._chunked = config.scheduler.enable_chunked_prefill
        self._caching = config.cache.enable_prefix_caching
        self._watermark = num_blocks // 100  # blocks that admission leaves to the sequences that run already
        self._requests: dict[str, RequestState] = {}
        self._arrivals = 0
        self._num_open = 0  # unfinished sequences of all requests
        self._line = WaitingQueue()
        self._prefilling: list[Sequence] = []  # admitted, context not run to its end; first in rank first
        self._in_flight: deque[StepInFlight] = deque()

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> dict[str, RequestState]:
        """Requests with an unfinished sequence, by id."""
        return self._requests

    def add(self, request: Request) -> None:
        """Accept a request that RequestLimits has checked and whose id is not in use."""
        context = np.array(request.prompt_token_ids + request.emitted_token_ids, np.int32)
        state = RequestState(request, self._arrivals, context, num_open=request.num_samples)
        self._arrivals += 1
        for sample in range(request.first_sample, request.first_sample + request.num_samples):
            rank = (request.priority, state.arrival, sample)
            state.sequences.append(Sequence(state, sample, rank, request.request_id))
        if request.sampling.prompt_logprobs is not None and not request.emitted_token_ids:
            state.prompt_logprobs = [None for _ in request.prompt_token_ids]
        self._requests[request.request_id] = state
        self._num_open += request.num_samples
        self._line.add(state)

    def abort(self, request_id: str, sample: int | None = None) -> list[FinishedSequence]:
        """End the request's unfinished sequences, or one, and free their blocks at once. Unknown ids are no error."""
        state = self._requests.get(request_id)
        return self._end_request(state, FinishReason.ABORT, sample) if state else []

    def end_all(self, reason: FinishReason) -> list[FinishedSequence]:
        """End every unfinished sequence and free its blocks."""
        return [ending for state in list(self._requests.values()) for ending in self._end_request(state, reason)]

    def abandon(self, error: str) -> list[FinishedSequence]:
        """End every unfinished sequence with an error and free nothing: after a failure no state can be trusted."""
        unfinished = [
            sequence
            for state in self._requests.values()
            for sequence in state.sequences
            if sequence.phase is not Phase.ENDED
        ]
        self._requests.clear()
        self._in_flight.clear()
        for sequence in unfinished:
            sequence.phase = Phase.ENDED
        return [FinishedSequence(sequence, FinishReason.ERROR, error=error) for sequence in unfinished]

    # -- planning ------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can run before a result has come."""
        draft = PlanBuilder()
        for _ in range(1 if self._lanes is None else self._lanes.num_lanes):  # a lane without work loses its turn
            self._fill(draft)
            if self._lanes is not None:
                self._lanes.advance()
            if not draft.empty:
                break
        if draft.empty:
            return None
        plan, scored = draft.build(self.counters.steps)
        self.counters.steps += 1
        sample_rows = plan.sample_rows.astype(np.intp)
        epochs = self.table.epoch
        chunk_epochs = {chunk.row: int(epochs[chunk.row]) for chunk in draft.chunks}
        self._in_flight.append(StepInFlight(plan.step, sample_rows, epochs[sample_rows], chunk_epochs, scored))
        for chunk in draft.chunks:
            self._register(self._sequence(chunk.row))
        return plan

    def _fill(self, draft: PlanBuilder) -> None:
        """Plan all that the budget allows."""
        self._plan_decodes(draft)
        budget = self._budget - draft.decode_rows.size
        if self._prefilling or self._line:
            if self._lanes is not None and self._chunked:
                budget = self._lanes.prefill_budget(self._prefilling, self._line, budget)
            budget = self._plan_running_prefills(draft, budget)
            self._admit(draft, budget)

    def _plan_decodes(self, draft: PlanBuilder) -> None:
        """One token of each decoding sequence that may have another; preempts until their blocks suffice."""
        table, pool = self.table, self.pool
        while True:
            ready = table.decoding & (table.length < table.max_length)
            rows = true_rows(ready) if self._lanes is None else self._lanes.rows(ready)
            if not rows.size:
                return
            starts = table.computed[rows]
            indices = starts >> self._shift
            lacking = indices >= table.num_blocks[rows]
            shared = (pool.ref_counts[table.last_block[rows]] > 1) & ~lacking
            num_lacking = int(np.count_nonzero(lacking))
            num_copies = pool.num_copies(table.last_block[rows[shared]]) if np.count_nonzero(shared) else 0
            if num_lacking + num_copies <= pool.num_free:
                break
            self._preempt_last()
        if num_copies:
            self._copy_on_write(draft, rows[shared], indices[shared])
        if num_lacking:
            growing, blocks = rows[lacking], pool.allocate(num_lacking)
            self._write_tables(draft, growing, indices[lacking], blocks)
            table.num_blocks[growing] += 1
        in_flight = table.in_flight[rows]
        tokens = np.full(rows.size, DEVICE_TOKEN, np.int32)
        read_back = true_rows(in_flight == 0)
        if read_back.size:
            tokens[read_back] = table.tokens[rows[read_back], starts[read_back]]
        table.computed[rows] = starts + 1
        table.length[rows] = starts + 2
        table.in_flight[rows] = in_flight + 1
        draft.decode_rows, draft.decode_starts, draft.decode_tokens = rows, starts, tokens

    def _copy_on_write(self, draft: PlanBuilder, rows: Rows, indices: Ints) -> None:
        """Give each row a copy of the block that it is to write; the last holder of a block keeps it."""
        pool, table = self.pool, self.table
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            source = table.blocks[row, index : index + 1].copy()
            if pool.ref_counts[source[0]] == 1:
                continue
            target = pool.allocate(1)
            pool.release(source)
            self._write_tables(draft, np.array([row]), np.array([index]), target)
            draft.copies.append(BlockCopy(int(source[0]), int(target[0])))
            pool.num_copied += 1
            self._sequence(row).state.num_copied += 1

    def _write_tables(self, draft: PlanBuilder, rows: Rows, indices: NDArray[np.integer], blocks: Ints) -> None:
        """blocks[row, index] = block for each triple; every index is the last one of its row."""
        self.table.blocks[rows, indices] = blocks
        self.table.last_block[rows] = blocks
        draft.tables.append((rows.astype(np.int32), indices.astype(np.int32), blocks))

    def _plan_running_prefills(self, draft: PlanBuilder, budget: int) -> int:
        """A chunk of each prompt that is under way, first in rank first. Returns the budget that is left."""
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            budget -= self._plan_chunk(draft, sequence, budget)
        return budget

    def _admit(self, draft: PlanBuilder, budget: int) -> None:
        """Start or resume sequences in rank order until the first one that does not fit."""
        while budget > 0:
            sequence = self._line.first(self.table.num_free_rows)
            if sequence is None or not self._claim_blocks(draft, sequence, budget):
                return
            budget -= self._plan_chunk(draft, sequence, budget)

    def _claim_blocks(self, draft: PlanBuilder, sequence: Sequence, budget: int) -> bool:
        """Take the sequence out of the line with all blocks of its context, or leave everything as it is."""
        state, pool, table = sequence.state, self.pool, self.table
        resumed = sequence.phase is Phase.PREEMPTED
        if resumed and table.in_flight[sequence.row]:
            return False  # its last tokens are not known yet
        context = table.context(sequence.row) if resumed else state.context
        reused = self._cached_prefix(sequence, context)
        num_cached = len(reused) << self._shift
        if not self._chunked and len(context) - num_cached > budget:
            return False
        num_new = -(-len(context) // pool.block_size) - len(reused)
        spare = pool.num_free - pool.num_idle(reused) - num_new
        anyone_runs = pool.num_free < pool.num_blocks
        if spare < (self._watermark if anyone_runs else 0):
            return False
        pool.acquire(reused)
        blocks = np.concatenate([reused, pool.allocate(num_new)])
        if resumed:
            self._line.remove_preempted(sequence)
        else:
            self._line.pop()
            for fork in state.sequences:
                table.assign(fork)
            prompt_len = len(state.request.prompt_token_ids)
            state.num_cached_tokens = min(num_cached, prompt_len)
            self.counters.prompt_tokens += prompt_len
            if self._caching and state.prompt_logprobs is None:
                self.counters.cache_queries += len(context)
                self.counters.cache_hits += num_cached
        sequence.phase = Phase.PREFILL
        sequence.num_registered = len(reused)
        insort(self._prefilling, sequence, key=lambda entry: entry.rank)
        table.set_blocks(sequence.row, blocks)
        table.computed[sequence.row] = num_cached
        draft.set_blocks(sequence.row, blocks)
        return True

    def _cached_prefix(self, sequence: Sequence, context: Ints) -> Ints:
        """Cached blocks at the start of the context; at least its last token is left to run."""
        if not self._caching or self._scores(sequence):
            return np.empty(0, np.int32)
        extend_digests(sequence.digests, context, self.pool.block_size, sequence.state.request.cache_salt)
        return self.pool.lookup(sequence.digests[: (len(context) - 1) >> self._shift])

    def _scores(self, sequence: Sequence) -> bool:
        """Whether the prompt's log-probabilities are wanted of this run of the context, its first whole one."""
        return sequence.state.prompt_logprobs is not None and not self._has_token(sequence)

    def _plan_chunk(self, draft: PlanBuilder, sequence: Sequence, budget: int) -> int:
        """Plan as much of the context as the budget allows. Returns the number of tokens planned."""
        table, row = self.table, sequence.row
        start, length = int(table.computed[row]), int(table.length[row])
        end = min(length, start + budget)
        if end < length and not self._chunked:
            return 0
        next_token = None
        if self._scores(sequence):
            next_token = int(table.tokens[row, end]) if end < length else DEVICE_TOKEN
        if not sequence.started:
            self._start(draft, sequence)
        sampled = self._end_prefill(draft, sequence) if end == length else ()
        table.computed[row] = end
        draft.chunks.append(Chunk(row, start, table.tokens[row, start:end].copy(), sampled, next_token))
        return end - start

    def _start(self, draft: PlanBuilder, sequence: Sequence) -> None:
        draft.row_starts.append(sequence.row_start())
        sequence.started = True

    def _end_prefill(self, draft: PlanBuilder, leader: Sequence) -> tuple[int, ...]:
        """The context ends in this step: fork what waited for it. Returns the rows that sample from it."""
        table = self.table
        self._prefilling.remove(leader)
        length = table.length[leader.row]
        forks = [fork for fork in leader.state.sequences if fork is not leader and fork.phase is Phase.WAITING]
        blocks = table.block_table(leader.row)
        if forks:
            self.pool.share(blocks, len(forks))
        for fork in forks:
            table.set_blocks(fork.row, blocks)
            draft.set_blocks(fork.row, blocks)
            self._start(draft, fork)
            fork.digests, fork.num_registered = list(leader.digests), leader.num_registered
        running = [leader, *forks]
        rows = np.array([sequence.row for sequence in running])
        table.computed[rows] = length
        table.length[rows] = length + 1
        table.in_flight[rows] += 1
        table.decoding[rows] = True
        if self._lanes is not None:
            self._lanes.enter(rows)
        for sequence in running:
            sequence.phase = Phase.DECODE
        return tuple(rows.tolist())

    # -- results -------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> StepOutcome:
        """Take in the result of the oldest step in flight, and end the sequences that it completes."""
        table, step = self.table, self._in_flight.popleft()
        assert result.step == step.step, f"result of step {result.step} came, that of {step.step} was due"
        scored = [self._scored(step, chunk) for chunk in step.scored]
        failures = self._fail(step, result) if result.failed_rows else []
        rows, token_ids = step.sample_rows, result.token_ids
        samples = true_rows(table.epoch[rows] == step.sample_epochs)
        if samples.size < rows.size:
            rows, token_ids = rows[samples], token_ids[samples]
        positions = table.known[rows]
        known = positions + 1
        table.tokens[rows, positions] = token_ids
        table.known[rows] = known
        table.in_flight[rows] -= 1
        self.counters.generation_tokens += rows.size
        sequences, names = table.sequences[rows], (table.request_ids[rows], table.sample_numbers[rows])
        stopped = table.stopped(rows, token_ids) & (known >= table.min_length[rows])
        endings: dict[int, FinishedSequence] = {}
        for i in true_rows(stopped | (known >= table.max_length[rows])).tolist():
            reason = FinishReason.STOP if stopped[i] else FinishReason.LENGTH
            token = int(token_ids[i])
            at_eos = table.stops_at_eos[rows[i]] and table.is_eos[token]
            stop_reason = token if stopped[i] and not at_eos else None
            endings[i] = self._end(sequences.item(i), reason, stop_reason)
        firsts = true_rows(positions == table.context_length[rows])
        return StepOutcome(samples, sequences, *names, token_ids, firsts, endings, failures, scored)

    def _scored(self, step: StepInFlight, chunk: Chunk) -> tuple[Sequence, int] | None:
        if self.table.epoch[chunk.row] != step.chunk_epochs[chunk.row]:
            return None
        return self._sequence(chunk.row), chunk.start

    def _fail(self, step: StepInFlight, result: StepResult) -> list[FinishedSequence]:
        """End the sequences that the shards could not serve, with any fork that still waits for their prompt."""
        epochs = dict(zip(step.sample_rows.tolist(), step.sample_epochs.tolist(), strict=True)) | step.chunk_epochs
        endings: list[FinishedSequence] = []
        for row, message in result.failed_rows:
            if self.table.epoch[row] != epochs.get(row):
                continue
            sequence = self._sequence(row)
            self._distrust(sequence)
            endings.append(self._end(sequence, FinishReason.ERROR, error=message))
            waiting = [fork for fork in sequence.state.sequences if fork.phase is Phase.WAITING]
            endings += [self._end(fork, FinishReason.ERROR, error=message) for fork in waiting]
        return endings

    def _distrust(self, sequence: Sequence) -> None:
        """Keep what a failed sequence computed out of the prefix cache, be it preempted since: it may be spoilt."""
        self.pool.forget(sequence.digests)
        sequence.num_registered = len(self.table.block_table(sequence.row))

    # -- leaving -------------------------------------------------------------------------------------------------

    def _preempt_last(self) -> None:
        """Take the blocks of the sequence that is last in rank; it is prefilled again when there is room."""
        holders = [self._sequence(row) for row in np.flatnonzero(self.table.num_blocks).tolist()]
        assert len(holders) > 1, "one sequence alone does not fit the pool; its limits were not checked"
        sequence = max(holders, key=lambda entry: entry.rank)
        self._give_up_blocks(sequence)
        self.table.decoding[sequence.row] = False
        self.table.computed[sequence.row] = 0
        sequence.phase = Phase.PREEMPTED
        sequence.num_registered = 0
        self._line.add_preempted(sequence)
        self.counters.preemptions += 1

    def _end_request(
        self, state: RequestState, reason: FinishReason, sample: int | None = None
    ) -> list[FinishedSequence]:
        """A sample alone must have had a token to be ended: before, others may wait for the prompt that it runs."""
        unfinished = [entry for entry in state.sequences if entry.phase is not Phase.ENDED]
        named = [entry for entry in unfinished if sample is None or (entry.sample == sample and self._has_token(entry))]
        return [self._end(sequence, reason) for sequence in named]

    def _has_token(self, sequence: Sequence) -> bool:
        row = sequence.row
        return row >= 0 and bool(self.table.known[row] > self.table.context_length[row])

    def _end(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | None = None, error: str | None = None
    ) -> FinishedSequence:
        """Free all that the sequence has. A request that waits is dropped from the line when its turn comes."""
        if sequence.phase is Phase.PREEMPTED:
            self._line.remove_preempted(sequence)
        if sequence.row >= 0:
            self._give_up_blocks(sequence)
            self.table.free(sequence.row)
        sequence.phase = Phase.ENDED
        state = sequence.state
        state.num_open -= 1
        self._num_open -= 1
        if not state.num_open:
            del self._requests[state.request.request_id]
        return FinishedSequence(sequence, reason, stop_reason, error)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        self._register(sequence)
        self.pool.release(self.table.block_table(sequence.row))
        self.table.num_blocks[sequence.row] = 0

    def _register(self, sequence: Sequence) -> None:
        """Make the full blocks that submitted steps have filled with known tokens reusable."""
        table, row = self.table, sequence.row
        num_full = min(int(table.computed[row]), int(table.known[row])) >> self._shift
        if not self._caching or num_full <= sequence.num_registered:
            return
        salt = sequence.state.request.cache_salt
        extend_digests(sequence.digests, table.context(row), self.pool.block_size, salt)
        begin, sequence.num_registered = sequence.num_registered, num_full
        self.pool.register(table.block_table(row)[begin:num_full], sequence.digests[begin:num_full])

    # -- reports -------------------------------------------------------------------------------------------------

    def load(self) -> ReplicaLoad:
        """Counts for placement and metrics."""
        num_running = int(np.count_nonzero(self.table.num_blocks))
        num_waiting = max(0, self._num_open - num_running)
        return self.counters.load(self.pool, num_running=num_running, num_waiting=num_waiting)

    def block_report(self, state: RequestState) -> BlockReport:
        """How the request's sequences hold their blocks."""
        holders = [entry for entry in state.sequences if entry.phase in (Phase.PREFILL, Phase.DECODE)]
        tables = [self.table.block_table(sequence.row) for sequence in holders]
        blocks = np.unique(np.concatenate(tables)) if tables else np.empty(0, np.int32)
        num_shared = int(np.count_nonzero(self.pool.ref_counts[blocks] > 1))
        return BlockReport(shared=num_shared, private=len(blocks) - num_shared, copied=state.num_copied)

    def check(self) -> None:
        """Prove the pool's invariants against the tables of all sequences."""
        tables = [self.table.block_table(row) for row in np.flatnonzero(self.table.num_blocks).tolist()]
        self.pool.check(tables)

    def _sequence(self, row: int) -> Sequence:
        sequence: Sequence = self.table.sequences.item(row)
        return sequence
