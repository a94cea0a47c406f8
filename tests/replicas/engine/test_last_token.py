"""A logits processor that needs each row's last token on the host keeps its own rows, and no others, at one step."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.plan import RowStart, StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams
from shoal.replicas.sampling import processor_table
from shoal.replicas.sampling.processor_table import ProcessorSpec

TINY = Path(__file__).parents[3] / "deploy" / "models" / "tiny"
PROMPT = (50, 60, 70, 80, 90)
READER_SEED = 77


class NeverTwice:
    """Forbids the last token and records what it observed."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.observed: dict[int, list[int]] = {}

    def start(self, start: RowStart) -> None:
        self.observed[start.row] = []

    def stop(self, row: int) -> None:
        self.observed.pop(row, None)

    def __contains__(self, row: int) -> bool:
        return row in self.observed

    def apply(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            if row in self.observed:
                assert len(self.observed[row]) == position - len(PROMPT), "a token was sampled before the last was read"
                logits[i, self.observed[row][-1:]] = -float("inf")

    def accept(self, rows: Sequence[int], tokens: torch.Tensor) -> None: ...

    def observe(self, row: int, token_id: int) -> None:
        self.observed[row].append(token_id)


def watch(engine: Engine) -> dict[int, set[int]]:
    """By seed: how many steps in flight have sampled the sequence at once, whenever a plan was submitted."""
    executor, pending, seed_of_row = engine._executor, deque[StepPlan](), dict[int, int]()
    depths: dict[int, set[int]] = {}
    submit, result = executor.submit, executor.result

    def watched_submit(plan: StepPlan) -> None:
        seed_of_row.update((start.row, start.seed) for start in plan.row_starts)
        pending.append(plan)
        for row, count in Counter(row for one in pending for row in one.sample_rows.tolist()).items():
            depths.setdefault(seed_of_row[row], set()).add(count)
        submit(plan)

    def watched_result() -> StepResult:
        found = result()
        pending.popleft()
        return found

    executor.submit, executor.result = watched_submit, watched_result
    return depths


def test_a_row_whose_processor_reads_tokens_has_one_step_in_flight(monkeypatch: pytest.MonkeyPatch):
    made: list[NeverTwice] = []

    def make(*args) -> NeverTwice:
        made.append(NeverTwice(*args))
        return made[-1]

    spec = ProcessorSpec(lambda: make, lambda params: params.seed == READER_SEED, needs_last_token=True)
    monkeypatch.setattr(processor_table, "LOGITS_PROCESSORS", (*processor_table.LOGITS_PROCESSORS, spec))
    config = EngineConfig(
        ModelConfig(str(TINY), dtype="float32", max_model_len=256),
        CacheConfig(num_blocks=64, block_size=16),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_steps_in_flight=2),
        device="cpu",
        num_threads=1,
    )
    engine = build_engine(config)
    depths = watch(engine)
    # Greedy with a bias that repeats one token for ever, unless a processor forbids it.
    biased = {"max_tokens": 12, "ignore_eos": True, "temperature": 0.0, "logit_bias": ((9, 100.0), (11, 90.0))}
    reader = Request("reader", PROMPT, SamplingParams(seed=READER_SEED, **biased))
    others = [Request(str(seed), PROMPT, SamplingParams(seed=seed, **biased)) for seed in (1, 2)]
    found = generate(engine, [others[0], reader, others[1]])
    engine.shutdown()
    assert list(found["reader"][0].token_ids) == [9, 11] * 6
    assert [list(found[each.request_id][0].token_ids) for each in others] == [[9] * 12] * 2
    assert list(made[0].observed.values()) == [([9, 11] * 6)[:11]]
    assert depths == {READER_SEED: {1}, 1: {1, 2}, 2: {1, 2}}


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({}, []),
        ({"logit_bias": ((1, 2.0),)}, ["LogitBias"]),
        ({"allowed_token_ids": (1,)}, ["AllowedTokens"]),
        ({"bad_words": ((1, 2),)}, ["BadWords"]),
        ({"min_tokens": 1}, ["MinTokens"]),
        ({"presence_penalty": 0.1}, ["Penalties"]),
        ({"frequency_penalty": -0.1}, ["Penalties"]),
        ({"repetition_penalty": 0.9}, ["Penalties"]),
        ({"min_tokens": 2, "logit_bias": ((1, 2.0),)}, ["LogitBias", "MinTokens"]),
    ],
)
def test_parameters_activate_their_processors(params: dict, names: list[str]):
    specs = processor_table.LOGITS_PROCESSORS
    assert [spec.load().__name__ for spec in specs if spec.is_active(SamplingParams(**params))] == names
    assert not processor_table.needs_last_token(SamplingParams(**params))
