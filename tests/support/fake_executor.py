"""Ranks without a model: the next token is a hash of the tokens read through the block tables.

The fake keeps a store [num_blocks, block_size] of (token, position) and uses it as a rank uses its KV cache: it applies
table updates and copies, writes the step's tokens, and reads each whole context back. A block that is freed too early,
copied too late or shared wrongly changes the context, and so the output.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from shoal.replicas.errors import EngineError
from shoal.replicas.plan import DEVICE_TOKEN, LogprobArrays, RowStart, StepPlan, StepResult

POISON = -7  # what a slot that was never written reads as


def next_token(context: Sequence[int], seed: int, vocab_size: int, allowed: Callable[[int], bool] | None = None) -> int:
    """The fake model: token after `context`, drawn again until `allowed`."""
    for attempt in range(1000):
        key = np.array([seed & 0x7FFFFFFF, attempt, *context], np.int64).tobytes()
        token = int.from_bytes(blake2b(key, digest_size=8).digest(), "little") % vocab_size
        if allowed is None or allowed(token):
            return token
    raise AssertionError("no token is allowed")


def logprob_of(context: Sequence[int], token: int) -> float:
    """A log-probability that depends on the whole context."""
    digest = blake2b(np.array([token, *context], np.int64).tobytes(), digest_size=4).digest()
    return -float(int.from_bytes(digest, "little") % 1000) / 100.0


class FakeExecutor:
    """Implements `Executor`. `fail_rows` and `fail_step` make samples or a whole step fail; `gate` holds results."""

    def __init__(
        self, num_blocks: int, block_size: int, max_rows: int, max_model_len: int, vocab_size: int, eos: tuple[int, ...]
    ) -> None:
        self.num_blocks = num_blocks
        self.vocab_size = vocab_size
        self.plans: list[StepPlan] = []
        self.on_submit: Callable[[StepPlan], None] | None = None
        self.fail_rows: dict[int, str] = {}
        self.fail_step: int | None = None
        self.gate: threading.Event | None = None
        self.closed = False
        self._block_size = block_size
        self._eos = eos
        self._tokens = np.full((num_blocks, block_size), POISON, np.int64)
        self._positions = np.full((num_blocks, block_size), POISON, np.int64)
        self._tables = np.full((max_rows, -(-max_model_len // block_size)), -1, np.int64)
        self._starts: dict[int, RowStart] = {}
        self._last_token: dict[int, int] = {}
        self._pending: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._pending.append(plan)
        if self.on_submit is not None:
            self.on_submit(plan)

    def result(self) -> StepResult:
        if self.gate is not None:
            assert self.gate.wait(30), "the test never opened the gate"
        plan = self._pending.popleft()
        if plan.step == self.fail_step:
            raise EngineError("the fake step failed")
        return self._run(plan)

    def shutdown(self) -> None:
        self.closed = True

    def _run(self, plan: StepPlan) -> StepResult:
        for start in plan.row_starts:
            self._starts[start.row] = start
            self._last_token.pop(start.row, None)
        self._tables[plan.table_rows, plan.table_indices] = plan.table_blocks
        for copy in plan.copies:
            self._tokens[copy.target] = self._tokens[copy.source]
            self._positions[copy.target] = self._positions[copy.source]
        slices = plan.slices()
        lengths = [part.num_tokens for part in slices]
        assert lengths == sorted(lengths, key=lambda length: length > 1), "slices of one token come first"
        for part in slices:
            tokens = [self._last_token[part.row] if token == DEVICE_TOKEN else token for token in part.token_ids]
            for position, token in enumerate(tokens, part.start):
                slot = self._tables[part.row, position // self._block_size], position % self._block_size
                self._tokens[slot], self._positions[slot] = token, position
        contexts = [self._read(part.row, part.start + part.num_tokens) for part in slices]
        sampled: list[tuple[list[int], int]] = []
        counts: list[int] = []
        for index, row in zip(plan.sample_slices.tolist(), plan.sample_rows.tolist(), strict=True):
            num_drafts = int(plan.num_drafts[len(counts)]) if plan.num_drafts.size else 0
            tokens = self._verify(contexts[index], num_drafts, self._starts[row])
            self._last_token[row] = tokens[-1][1]
            sampled += tokens
            counts.append(len(tokens))
        failed = [(row, self.fail_rows.pop(row)) for row in plan.sample_rows.tolist() if row in self.fail_rows]
        return StepResult(
            step=plan.step,
            token_ids=np.array([token for _, token in sampled], np.int32),
            logprobs=_logprobs(sampled) if self._wants_logprobs(plan) else None,
            prompt_logprobs=tuple(
                self._score(contexts[index], slices[index].start, following)
                for index, following in zip(plan.scored_slices.tolist(), plan.scored_next.tolist(), strict=True)
            ),
            failed_rows=tuple(failed),
            counts=np.array(counts if plan.num_drafts.size else [], np.int32),
        )

    def _read(self, row: int, length: int) -> list[int]:
        table = self._tables[row, : -(-length // self._block_size)]
        positions = self._positions[table].reshape(-1)[:length]
        assert (positions == np.arange(length)).all(), f"row {row} reads slots of positions {positions.tolist()}"
        return self._tokens[table].reshape(-1)[:length].tolist()

    def _verify(self, context: list[int], num_drafts: int, start: RowStart) -> list[tuple[list[int], int]]:
        """Contexts and samples: one after each draft that equals the sample before it."""
        begin = len(context) - num_drafts
        sampled: list[tuple[list[int], int]] = []
        for length in range(begin, len(context) + 1):
            sampled.append((context[:length], self._sample(context[:length], start)))
            if length < len(context) and context[length] != sampled[-1][1]:
                break
        return sampled

    def _sample(self, context: list[int], start: RowStart) -> int:
        sampling = start.sampling
        too_early = len(context) - start.prompt_len < sampling.min_tokens
        banned = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)} if too_early else set()
        return next_token(context, start.seed, self.vocab_size, lambda token: token not in banned)

    def _wants_logprobs(self, plan: StepPlan) -> bool:
        return any(self._starts[row].sampling.logprobs is not None for row in plan.sample_rows.tolist())

    @staticmethod
    def _score(context: list[int], start: int, following: int) -> LogprobArrays:
        tokens = context if following == DEVICE_TOKEN else [*context, following]
        return _logprobs([(tokens[:end], tokens[end]) for end in range(start + 1, len(tokens))])


def _logprobs(pairs: list[tuple[list[int], int]]) -> LogprobArrays:
    ids = np.array([token for _, token in pairs], np.int32)
    values = np.array([logprob_of(context, token) for context, token in pairs], np.float32)
    return LogprobArrays(ids, values, np.ones_like(ids), np.stack([ids, ids], 1), np.stack([values, values], 1))
