"""Engines on the fake executor, and the naive loop that their outputs are compared with."""

from __future__ import annotations

from random import Random

import numpy as np

from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts, ParallelConfig, SchedulerConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.engine.sequence import Sequence
from shoal.replicas.plan import Ints, StepPlan
from shoal.replicas.protocol import FinishReason, Request, TokenDelta
from tests.support.fake_executor import FakeExecutor, next_token

VOCAB_SIZE = 40
EOS = 3


def facts(max_model_len: int = 256, vocab_size: int = VOCAB_SIZE) -> ModelFacts:
    return ModelFacts(
        architecture="Fake",
        num_layers=4,
        hidden_size=8,
        num_attention_heads=1,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=vocab_size,
        max_position_embeddings=max_model_len,
        eos_token_ids=(EOS,),
        dtype="float32",
    )


def make_engine(
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 256,
    max_steps_in_flight: int | None = None,
    enable_prefix_caching: bool = True,
    enable_chunked_prefill: bool = True,
    num_stages: int = 1,
) -> tuple[Engine, FakeExecutor]:
    """An engine whose every plan is checked: no block is written that another sequence holds or writes too."""
    model = facts(max_model_len)
    config = EngineConfig(
        ModelConfig("fake"),
        CacheConfig(block_size=block_size, num_blocks=num_blocks, enable_prefix_caching=enable_prefix_caching),
        SchedulerConfig(max_num_seqs, max_num_batched_tokens, enable_chunked_prefill, max_steps_in_flight),
        ParallelConfig(pipeline_parallel_size=num_stages),
    ).resolve(model, "cpu")
    executor = FakeExecutor(num_blocks, block_size, max_num_seqs, max_model_len, VOCAB_SIZE, (EOS,))
    engine = Engine(config, model, executor)

    def check_plan(plan: StepPlan) -> None:
        scheduler = engine.scheduler
        written: list[int] = []
        for index, part in enumerate(plan.slices()):
            first, last = part.start // block_size, (part.start + part.num_tokens - 1) // block_size
            blocks = scheduler.table.blocks[part.row, first : last + 1]
            num_owners = max(1, np.count_nonzero(plan.sample_slices == index))  # a fork starts after this slice
            assert (scheduler.pool.ref_counts[blocks] == num_owners).all(), "a block of two owners is written"
            written += blocks.tolist()
        assert len(set(written)) == len(written), "a block is written by two rows of one step"
        assert int(plan.num_tokens.sum()) <= max_num_batched_tokens
        scheduler.check()

    executor.on_submit = check_plan
    return engine, executor


def naive(request: Request) -> list[tuple[list[int], FinishReason, int | None]]:
    """New tokens, finish reason and stop reason of each sample, made one token at a time from the whole context."""
    sampling = request.sampling
    outputs = []
    for sample in range(request.first_sample, request.first_sample + request.num_samples):
        output = list(request.emitted_token_ids)
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (EOS,))}
        while True:
            banned = stops if len(output) < sampling.min_tokens else set()
            context = [*request.prompt_token_ids, *output]
            token = next_token(
                context, request.sample_seed(sample), VOCAB_SIZE, lambda token, banned=banned: token not in banned
            )
            output.append(token)
            if token in stops:
                at_eos = token == EOS and not sampling.ignore_eos
                reason, stop_reason = FinishReason.STOP, None if at_eos else token
                break
            if len(output) == sampling.max_tokens:
                reason, stop_reason = FinishReason.LENGTH, None
                break
        outputs.append((output[len(request.emitted_token_ids) :], reason, stop_reason))
    return outputs


class NoisyProposer:
    """Proposes up to `max_drafts` tokens. Each is the model's next token in two cases of three."""

    def __init__(self, max_drafts: int) -> None:
        self.max_drafts = max_drafts
        self.num_proposed = 0
        self._random = Random(0)

    def propose(self, sequence: Sequence, context: Ints, max_tokens: int) -> Ints:
        """As DraftProposer says."""
        seed, tokens = sequence.state.request.sample_seed(sequence.sample), context.tolist()
        for _ in range(min(self.max_drafts, max_tokens)):
            wrong = self._random.randrange(3) == 0
            tokens.append(self._random.randrange(VOCAB_SIZE) if wrong else next_token(tokens, seed, VOCAB_SIZE))
        self.num_proposed += len(tokens) - len(context)
        return np.array(tokens[len(context) :], np.int32)


class Transcript:
    """Collects deltas and insists on the protocol: nothing follows a terminal delta."""

    def __init__(self) -> None:
        self.deltas: dict[tuple[str, int], list[TokenDelta]] = {}

    def add(self, deltas: list[TokenDelta]) -> None:
        for delta in deltas:
            earlier = self.deltas.setdefault((delta.request_id, delta.sample), [])
            assert not earlier or earlier[-1].finish_reason is None, f"{delta} follows the end of its sequence"
            earlier.append(delta)

    def run(self, engine: Engine) -> Transcript:
        while engine.has_work:
            self.add(engine.step())
        return self

    def tokens(self, request_id: str, sample: int = 0) -> list[int]:
        return [token for delta in self.deltas.get((request_id, sample), []) for token in delta.token_ids]

    def end(self, request_id: str, sample: int = 0) -> TokenDelta:
        last = self.deltas[request_id, sample][-1]
        assert last.finish_reason is not None, f"{request_id} has not ended"
        return last

    def outcome(self, request: Request) -> list[tuple[list[int], FinishReason | None, int | str | None]]:
        """As `naive` gives it."""
        ids = range(request.first_sample, request.first_sample + request.num_samples)
        ends = [self.end(request.request_id, sample) for sample in ids]
        return [
            (self.tokens(request.request_id, sample), end.finish_reason, end.stop_reason)
            for sample, end in zip(ids, ends, strict=True)
        ]
