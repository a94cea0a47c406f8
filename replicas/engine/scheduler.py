"""Decides what each step runs: continuous batching over one token budget, planned ahead of the sampled tokens.

A step takes, in this order:

1. every decoding sequence, one token each;
2. the next chunk of every prompt that is being prefilled, lowest scheduling key first;
3. preempted and new sequences, by scheduling key, as far as rows, blocks and budget go.

A context gets all of its blocks at admission, so only decoding can run out of them. Then the sequence with the
highest key loses its blocks, keeps its row and tokens, and is prefilled again later. The lowest key is never
preempted for another, so there is always progress. With pipeline stages a step decodes one micro-batch.

Plans run in order. So a plan may reuse freed blocks that steps in flight still write to, and a prompt's blocks
before any rank has run it.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from ..config import ModelFacts, ResolvedConfig
from ..plan import DEVICE_TOKEN, BlockCopy, Ints, StepPlan, StepResult
from ..protocol import BlockReport, FinishReason, ReplicaLoad, Request
from .block_pool import BlockPool, extend_hashes
from .counters import Counters
from .drafts import DraftProposer, accepted, add_drafts, roll_back
from .micro_batches import MicroBatches
from .plan_builder import Chunk, PlanBuilder, Rows
from .sequence import FinishedSequence, Phase, RequestState, Sequence, SequenceTable, true_rows
from .step_outcome import StepInFlight, StepOutcome
from .waiting_queue import WaitingQueue


class Scheduler:
    """Plans steps and applies their results. Owns the sequences and the block pool; not thread-safe."""

    def __init__(self, config: ResolvedConfig, facts: ModelFacts, num_blocks: int) -> None:
        block_size, max_model_len = config.cache.block_size, config.model.max_model_len
        num_stages, in_flight = config.parallel.pipeline_parallel_size, config.scheduler.max_steps_in_flight
        self.pool = BlockPool(num_blocks, block_size)
        # More steps in flight would only delay new requests: a micro-batch's plans run one after the other.
        row_limit = in_flight // num_stages if num_stages > 1 else None
        self.table = SequenceTable(config.scheduler.max_num_seqs, max_model_len, block_size, facts, row_limit)
        self.counters = Counters()
        self.proposer: DraftProposer | None = None
        self._micro_batches = MicroBatches(num_stages, self.table) if num_stages > 1 else None
        self._shift = block_size.bit_length() - 1
        self._budget = config.scheduler.max_num_batched_tokens
        self._chunked = config.scheduler.enable_chunked_prefill
        self._caching = config.cache.enable_prefix_caching
        self._watermark = num_blocks // 100  # that admission leaves to running sequences
        self.requests: dict[str, RequestState] = {}  # unfinished, by id
        self._arrivals = 0
        self._num_open = 0
        self._waiting = WaitingQueue()
        self._prefilling: list[Sequence] = []  # admitted, by key
        self._in_flight: deque[StepInFlight] = deque()

    # -- requests ------------------------------------------------------------------------------------------------

    def add(self, request: Request, *, max_steps_in_flight: int | None = None) -> None:
        """Accept a request that RequestLimits has checked and whose id is not in use.

        max_steps_in_flight: of each sequence. With 1, a decode waits for the last token.
        """
        context = np.array(request.prompt_token_ids + request.emitted_token_ids, np.int32)
        state = RequestState(request, self._arrivals, context, num_open=request.num_samples)
        state.max_steps_in_flight = max_steps_in_flight
        self._arrivals += 1
        for sample in range(request.first_sample, request.first_sample + request.num_samples):
            key = (request.priority, state.arrival, sample)
            state.sequences.append(Sequence(state, sample, key, request.request_id))
        if request.sampling.prompt_logprobs is not None and not request.emitted_token_ids:
            state.prompt_logprobs = [None for _ in request.prompt_token_ids]
        self.requests[request.request_id] = state
        self._num_open += request.num_samples
        self._waiting.add(state)

    def abort(self, request_id: str, sample: int | None = None) -> list[FinishedSequence]:
        """End the request's unfinished sequences, or one. Unknown ids are no error."""
        state = self.requests.get(request_id)
        return self._end_request(state, FinishReason.ABORT, sample) if state else []

    def end_all(self, reason: FinishReason) -> list[FinishedSequence]:
        """End every unfinished sequence."""
        return [one for state in list(self.requests.values()) for one in self._end_request(state, reason)]

    def abandon(self, error: str) -> list[FinishedSequence]:
        """End every unfinished sequence with an error. Frees nothing: after a failure no state is valid."""
        sequences = [sequence for state in self.requests.values() for sequence in state.sequences]
        unfinished = [sequence for sequence in sequences if sequence.phase is not Phase.ENDED]
        self.requests.clear()
        self._in_flight.clear()
        for sequence in unfinished:
            sequence.phase = Phase.ENDED
        return [FinishedSequence(sequence, FinishReason.ERROR, error=error) for sequence in unfinished]

    # -- planning ------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can run before the next result."""
        builder = PlanBuilder()
        num_tries = 1 if self._micro_batches is None else self._micro_batches.num_batches
        for _ in range(num_tries):  # a micro-batch without work loses its turn
            self._fill(builder)
            if self._micro_batches is not None:
                self._micro_batches.advance()
            if not builder.empty:
                break
        if builder.empty:
            return None
        plan, scored = builder.build(self.counters.steps)
        self.counters.steps += 1
        self._in_flight.append(StepInFlight.of(plan, builder.chunks, scored, self.table.epoch))
        for chunk in builder.chunks:
            self._register(self._sequence(chunk.row))
        return plan

    def _fill(self, builder: PlanBuilder) -> None:
        self._plan_decodes(builder)
        budget = self._budget - builder.decode_rows.size
        if self.proposer is not None:
            budget -= add_drafts(self.proposer, builder, self.table, self.pool, budget)
        if self._prefilling or self._waiting:
            if self._micro_batches is not None and self._chunked:
                budget = self._micro_batches.prefill_budget(self._prefilling, self._waiting, budget)
            budget = self._plan_running_prefills(builder, budget)
            self._admit(builder, budget)

    def _plan_decodes(self, builder: PlanBuilder) -> None:
        """Plan a token of each decoding sequence below its limits; preempt for blocks."""
        table, pool = self.table, self.pool
        while True:
            ready = table.decoding & (table.length < table.max_length)
            rows = true_rows(ready) if self._micro_batches is None else self._micro_batches.rows(ready)
            if table.limits_in_flight:
                rows = rows[table.in_flight[rows] < table.max_in_flight[rows]]
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
            self._copy_on_write(builder, rows[shared], indices[shared])
        if num_lacking:
            growing, blocks = rows[lacking], pool.allocate(num_lacking)
            self._write_tables(builder, growing, indices[lacking], blocks)
            table.num_blocks[growing] += 1
        in_flight = table.in_flight[rows]
        tokens = np.full(rows.size, DEVICE_TOKEN, np.int32)
        read_back = true_rows(in_flight == 0)
        if read_back.size:
            tokens[read_back] = table.tokens[rows[read_back], starts[read_back]]
        table.computed[rows] = starts + 1
        table.length[rows] = starts + 2
        table.in_flight[rows] = in_flight + 1
        builder.decode_rows, builder.decode_starts, builder.decode_tokens = rows, starts, tokens

    def _copy_on_write(self, builder: PlanBuilder, rows: Rows, indices: Ints) -> None:
        """Copy each shared block that a row is about to write; its last holder keeps it."""
        pool, table = self.pool, self.table
        for row, index in zip(rows.tolist(), indices.tolist(), strict=True):
            source = table.blocks[row, index : index + 1].copy()
            if pool.ref_counts[source[0]] == 1:
                continue
            target = pool.allocate(1)
            pool.release(source)
            self._write_tables(builder, np.array([row]), np.array([index]), target)
            builder.copies.append(BlockCopy(int(source[0]), int(target[0])))
            pool.num_copied += 1
            self._sequence(row).state.num_copied += 1

    def _write_tables(self, builder: PlanBuilder, rows: Rows, indices: NDArray[np.integer], blocks: Ints) -> None:
        """Set blocks[row, index] = block; every index is the last of its row."""
        self.table.blocks[rows, indices] = blocks
        self.table.last_block[rows] = blocks
        builder.tables.append((rows.astype(np.int32), indices.astype(np.int32), blocks))

    def _plan_running_prefills(self, builder: PlanBuilder, budget: int) -> int:
        """Returns the remaining budget."""
        for sequence in list(self._prefilling):
            if budget <= 0:
                break
            budget -= self._plan_chunk(builder, sequence, budget)
        return budget

    def _admit(self, builder: PlanBuilder, budget: int) -> None:
        """Start or resume sequences by key until one does not fit."""
        while budget > 0:
            sequence = self._waiting.first(self.table.num_free_rows)
            if sequence is None or not self._claim_blocks(builder, sequence, budget):
                return
            budget -= self._plan_chunk(builder, sequence, budget)

    def _claim_blocks(self, builder: PlanBuilder, sequence: Sequence, budget: int) -> bool:
        """Admit the sequence with all blocks of its context, or change nothing and return False."""
        state, pool, table = sequence.state, self.pool, self.table
        resumed = sequence.phase is Phase.PREEMPTED
        if resumed and table.in_flight[sequence.row]:
            return False  # its last tokens are not read back
        context = table.context(sequence.row) if resumed else state.context
        reused = self._cached_prefix(sequence, context)
        num_cached = len(reused) << self._shift
        if not self._chunked and len(context) - num_cached > budget:
            return False
        num_new = -(-len(context) // pool.block_size) - len(reused)
        spare = pool.num_free - pool.num_idle(reused) - num_new
        pool_in_use = pool.num_free < pool.num_blocks
        if spare < (self._watermark if pool_in_use else 0):
            return False
        pool.acquire(reused)
        blocks = np.concatenate([reused, pool.allocate(num_new)])
        if resumed:
            self._waiting.remove_preempted(sequence)
        else:
            self._waiting.pop()
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
        insort(self._prefilling, sequence, key=lambda entry: entry.key)
        table.set_blocks(sequence.row, blocks)
        table.computed[sequence.row] = num_cached
        builder.set_blocks(sequence.row, blocks)
        return True

    def _cached_prefix(self, sequence: Sequence, context: Ints) -> Ints:
        """Cached blocks at the start of the context; at least the last token is run again."""
        if not self._caching or self._scores(sequence):
            return np.empty(0, np.int32)
        extend_hashes(sequence.hashes, context, self.pool.block_size, sequence.state.request.cache_salt)
        return self.pool.lookup(sequence.hashes[: (len(context) - 1) >> self._shift])

    def _scores(self, sequence: Sequence) -> bool:
        """Whether this run returns the prompt's log-probabilities: the first complete one does."""
        return sequence.state.prompt_logprobs is not None and not self._has_token(sequence)

    def _plan_chunk(self, builder: PlanBuilder, sequence: Sequence, budget: int) -> int:
        """Returns the number of tokens planned."""
        table, row = self.table, sequence.row
        start, length = int(table.computed[row]), int(table.length[row])
        end = min(length, start + budget)
        if end < length and not self._chunked:
            return 0
        next_token = None
        if self._scores(sequence):
            next_token = int(table.tokens[row, end]) if end < length else DEVICE_TOKEN
        if not sequence.started:
            self._start(builder, sequence)
        sampled = self._end_prefill(builder, sequence) if end == length else ()
        table.computed[row] = end
        builder.chunks.append(Chunk(row, start, table.tokens[row, start:end].copy(), sampled, next_token))
        return end - start

    def _start(self, builder: PlanBuilder, sequence: Sequence) -> None:
        builder.row_starts.append(sequence.row_start())
        sequence.started = True

    def _end_prefill(self, builder: PlanBuilder, leader: Sequence) -> tuple[int, ...]:
        """Fork the waiting samples of a context that ends in this step. Returns the rows that sample."""
        table = self.table
        self._prefilling.remove(leader)
        length = table.length[leader.row]
        forks = [fork for fork in leader.state.sequences if fork is not leader and fork.phase is Phase.WAITING]
        blocks = table.block_table(leader.row)
        if forks:
            self.pool.share(blocks, len(forks))
        for fork in forks:
            table.set_blocks(fork.row, blocks)
            builder.set_blocks(fork.row, blocks)
            self._start(builder, fork)
            fork.hashes, fork.num_registered = list(leader.hashes), leader.num_registered
        running = [leader, *forks]
        rows = np.array([sequence.row for sequence in running])
        table.computed[rows] = length
        table.length[rows] = length + 1
        table.in_flight[rows] += 1
        table.decoding[rows] = True
        if self._micro_batches is not None:
            self._micro_batches.enter(rows)
        for sequence in running:
            sequence.phase = Phase.DECODE
        return tuple(rows.tolist())

    # -- results -------------------------------------------------------------------------------------------------

    def update(self, result: StepResult) -> StepOutcome:
        """Apply the oldest step's result."""
        table, step = self.table, self._in_flight.popleft()
        assert result.step == step.step, f"result of step {result.step} came, that of {step.step} was due"
        scored = [self._scored(step, chunk) for chunk in step.scored]
        failures = self._fail(step, result) if result.failed_rows else []
        rows, token_ids = step.sample_rows, result.token_ids
        if result.counts.size:  # rows with several tokens are repeated
            samples, rows, positions = accepted(table, step, result)
            token_ids = token_ids[samples]
        else:
            assert not step.draft_rows, f"the result of step {step.step} has no counts for its draft tokens"
            samples = true_rows(table.epoch[rows] == step.sample_epochs)
            if samples.size < rows.size:
                rows, token_ids = rows[samples], token_ids[samples]
            positions = table.known[rows]
        known = positions + 1
        table.tokens[rows, positions] = token_ids
        table.known[rows] = known
        table.in_flight[rows] -= 1  # once, also for a repeated row
        if step.draft_rows:
            roll_back(table, self.pool, step)
        self.counters.generation_tokens += rows.size
        sequences, names = table.sequences[rows], (table.request_ids[rows], table.sample_numbers[rows])
        stopped = table.stopped(rows, token_ids) & (known >= table.min_length[rows])
        finished: dict[int, FinishedSequence] = {}
        for i in true_rows(stopped | (known >= table.max_length[rows])).tolist():
            reason = FinishReason.STOP if stopped[i] else FinishReason.LENGTH
            token = int(token_ids[i])
            at_eos = table.stops_at_eos[rows[i]] and table.is_eos[token]
            stop_reason = token if stopped[i] and not at_eos else None
            finished[i] = self._end(sequences.item(i), reason, stop_reason)
        firsts = true_rows(positions == table.context_length[rows])
        return StepOutcome(samples, sequences, *names, token_ids, firsts, finished, failures, scored)

    def _scored(self, step: StepInFlight, chunk: Chunk) -> tuple[Sequence, int] | None:
        if self.table.epoch[chunk.row] != step.chunk_epochs[chunk.row]:
            return None
        return self._sequence(chunk.row), chunk.start

    def _fail(self, step: StepInFlight, result: StepResult) -> list[FinishedSequence]:
        """End the sequences whose sampling failed, and forks that still wait for their prompt."""
        epochs = dict(zip(step.sample_rows.tolist(), step.sample_epochs.tolist(), strict=True)) | step.chunk_epochs
        finished: list[FinishedSequence] = []
        for row, message in result.failed_rows:
            if self.table.epoch[row] != epochs.get(row):
                continue
            sequence = self._sequence(row)
            self._forget_blocks(sequence)
            finished.append(self._end(sequence, FinishReason.ERROR, error=message))
            waiting = [fork for fork in sequence.state.sequences if fork.phase is Phase.WAITING]
            finished += [self._end(fork, FinishReason.ERROR, error=message) for fork in waiting]
        return finished

    def _forget_blocks(self, sequence: Sequence) -> None:
        """Drop a failed sequence's blocks from the prefix cache, even if it was preempted: they may be corrupt."""
        self.pool.forget(sequence.hashes)
        sequence.num_registered = len(self.table.block_table(sequence.row))

    # -- ends and preemption ------------------------------------------------------------------------------------

    def _preempt_last(self) -> None:
        holders = [self._sequence(row) for row in np.flatnonzero(self.table.num_blocks).tolist()]
        assert len(holders) > 1, "one sequence alone does not fit the pool; its limits were not checked"
        sequence = max(holders, key=lambda entry: entry.key)
        self._give_up_blocks(sequence)
        self.table.decoding[sequence.row] = False
        self.table.computed[sequence.row] = 0
        sequence.phase = Phase.PREEMPTED
        sequence.num_registered = 0
        self._waiting.add_preempted(sequence)
        self.counters.preemptions += 1

    def _end_request(
        self, state: RequestState, reason: FinishReason, sample: int | None = None
    ) -> list[FinishedSequence]:
        """One sample is ended only once it has a token: before, others may wait for its prompt."""
        unfinished = [entry for entry in state.sequences if entry.phase is not Phase.ENDED]
        named = [entry for entry in unfinished if sample is None or (entry.sample == sample and self._has_token(entry))]
        return [self._end(sequence, reason) for sequence in named]

    def _has_token(self, sequence: Sequence) -> bool:
        row = sequence.row
        return row >= 0 and bool(self.table.known[row] > self.table.context_length[row])

    def _end(
        self, sequence: Sequence, reason: FinishReason, stop_reason: int | None = None, error: str | None = None
    ) -> FinishedSequence:
        """Free row and blocks. The queue drops a waiting request at its turn."""
        if sequence.phase is Phase.PREEMPTED:
            self._waiting.remove_preempted(sequence)
        if sequence.row >= 0:
            self._give_up_blocks(sequence)
            self.table.free(sequence.row)
        sequence.phase = Phase.ENDED
        state = sequence.state
        state.num_open -= 1
        self._num_open -= 1
        if not state.num_open:
            del self.requests[state.request.request_id]
        return FinishedSequence(sequence, reason, stop_reason, error)

    def _give_up_blocks(self, sequence: Sequence) -> None:
        if sequence.phase is Phase.PREFILL:
            self._prefilling.remove(sequence)
        self._register(sequence)
        self.pool.release(self.table.block_table(sequence.row))
        self.table.num_blocks[sequence.row] = 0

    def _register(self, sequence: Sequence) -> None:
        """Add full blocks of known tokens that submitted steps compute to the prefix cache."""
        table, row = self.table, sequence.row
        num_full = min(int(table.computed[row]), int(table.known[row])) >> self._shift
        if not self._caching or num_full <= sequence.num_registered:
            return
        salt = sequence.state.request.cache_salt
        extend_hashes(sequence.hashes, table.context(row), self.pool.block_size, salt)
        begin, sequence.num_registered = sequence.num_registered, num_full
        self.pool.register(table.block_table(row)[begin:num_full], sequence.hashes[begin:num_full])

    # -- reports -------------------------------------------------------------------------------------------------

    def load(self) -> ReplicaLoad:
        """Counts for placement and metrics."""
        num_running = int(np.count_nonzero(self.table.num_blocks))
        num_waiting = max(0, self._num_open - num_running)
        return self.counters.load(self.pool, num_running=num_running, num_waiting=num_waiting)

    def block_report(self, state: RequestState) -> BlockReport:
        """Shared, private and copied blocks of the request's sequences."""
        holders = [entry for entry in state.sequences if entry.phase in (Phase.PREFILL, Phase.DECODE)]
        tables = [self.table.block_table(sequence.row) for sequence in holders]
        blocks = np.unique(np.concatenate(tables)) if tables else np.empty(0, np.int32)
        num_shared = int(np.count_nonzero(self.pool.ref_counts[blocks] > 1))
        return BlockReport(shared=num_shared, private=len(blocks) - num_shared, copied=state.num_copied)

    def check(self) -> None:
        """Assert the pool's invariants against all block tables."""
        tables = [self.table.block_table(row) for row in np.flatnonzero(self.table.num_blocks).tolist()]
        self.pool.check(tables)

    def _sequence(self, row: int) -> Sequence:
        sequence: Sequence = self.table.sequences.item(row)
        return sequence
