"""Several tokens of a row in one step: outputs equal the naive loop's, and rejected drafts leave nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shoal.replicas.plan import Ints, StepResult
from shoal.replicas.protocol import FinishReason, Request, SamplingParams
from tests.support.engines import NoisyProposer, Transcript, make_engine, naive

PROMPT = tuple(range(4, 24))


class Fixed:
    """Proposes the same tokens always."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = np.array(tokens, np.int32)

    def propose(self, sequence: object, context: Ints, max_tokens: int) -> Ints:
        return self.tokens[:max_tokens]


def requests() -> list[Request]:
    """Stop tokens, min_tokens, forks, log-probabilities, a shared prefix, and a request that returns."""
    params: list[dict[str, Any]] = [
        {"max_tokens": 1, "ignore_eos": True},
        {"max_tokens": 30, "ignore_eos": True},
        {"max_tokens": 30, "stop_token_ids": (5, 9, 17, 30), "min_tokens": 4},
        {"max_tokens": 25, "seed": 3},
        {"max_tokens": 20, "ignore_eos": True, "logprobs": 1},
    ]
    made = [Request(str(i), PROMPT[: 6 + 2 * i], SamplingParams(**p), 1 + i % 3) for i, p in enumerate(params)]
    emitted = tuple(naive(made[1])[0][0][:3])
    return [*made, Request("returned", made[1].prompt_token_ids, made[1].sampling, 1, 0, emitted)]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("limited", ["requests", "engine"])
@pytest.mark.parametrize("num_blocks", [64, 28])
def test_outputs_are_those_of_the_naive_loop(num_blocks: int, limited: str, num_stages: int):
    in_flight = num_stages if limited == "engine" else 2 * num_stages
    engine, executor = make_engine(
        num_blocks=num_blocks, max_model_len=64, max_steps_in_flight=in_flight, num_stages=num_stages
    )
    proposer = engine.scheduler.proposer = NoisyProposer(2)
    for request in requests():
        engine.add_request(request, max_steps_in_flight=1 if limited == "requests" else None)
    transcript = Transcript().run(engine)
    assert engine.failure is None
    for request in requests():
        assert transcript.outcome(request) == naive(request)
    assert proposer.num_proposed > 20
    assert (engine.load().num_preemptions > 0) == (num_blocks == 28)
    assert engine.load().num_free_blocks == num_blocks
    drafts = [int(count) for plan in executor.plans for count in plan.num_drafts]
    assert set(drafts) == {0, 1, 2}
    assert len(executor.plans) < sum(len(tokens) for request in requests() for tokens, _, _ in naive(request))


def test_rows_with_steps_in_flight_get_no_drafts():
    engine, executor = make_engine(max_steps_in_flight=2)
    engine.scheduler.proposer = NoisyProposer(2)
    engine.add_request(Request("free", PROMPT, SamplingParams(max_tokens=30, ignore_eos=True)))
    Transcript().run(engine)
    assert all(plan.num_drafts.size == 0 for plan in executor.plans[:-2])


def test_rejected_drafts_free_their_blocks_and_accepted_ones_stay():
    engine, _ = make_engine(block_size=4, max_num_batched_tokens=32)
    scheduler = engine.scheduler
    scheduler.proposer = Fixed(1, 2, 3, 1, 2, 3)
    scheduler.add(Request("a", PROMPT[:7], SamplingParams(max_tokens=40, ignore_eos=True)), max_steps_in_flight=1)
    prefill = scheduler.plan()
    assert prefill is not None
    assert scheduler.plan() is None, "the row has a limit of one step in flight"
    scheduler.update(StepResult(0, np.array([30], np.int32)))
    row, table = int(prefill.rows[0]), scheduler.table
    plan = scheduler.plan()
    assert plan is not None
    assert (plan.starts.tolist(), plan.token_ids.tolist(), plan.num_drafts.tolist()) == (
        [7],
        [30, 1, 2, 3, 1, 2, 3],
        [6],
    )
    assert table.num_blocks[row] == 4
    outcome = scheduler.update(StepResult(1, np.array([1, 2, 5], np.int32), counts=np.array([3], np.int32)))
    assert outcome.token_ids.tolist() == [1, 2, 5]
    assert [sequence.request_id for sequence in outcome.sequences] == ["a"] * 3
    assert table.context(row).tolist() == [*PROMPT[:7], 30, 1, 2, 5]
    assert (table.known[row], table.length[row], table.computed[row], table.in_flight[row]) == (11, 11, 10, 0)
    assert table.num_blocks[row] == 3
    scheduler.check()
    following = scheduler.plan()
    assert following is not None
    assert (following.starts.tolist(), following.token_ids.tolist()[0]) == ([10], 5)


def test_tokens_after_a_stop_token_are_dropped():
    engine, _ = make_engine(max_num_batched_tokens=32)
    scheduler = engine.scheduler
    scheduler.proposer = Fixed(9, 8)
    scheduler.add(Request("a", PROMPT, SamplingParams(max_tokens=40, stop_token_ids=(9,))), max_steps_in_flight=1)
    scheduler.plan()
    scheduler.update(StepResult(0, np.array([30], np.int32)))
    scheduler.plan()
    outcome = scheduler.update(StepResult(1, np.array([9, 8, 7], np.int32), counts=np.array([3], np.int32)))
    assert outcome.token_ids.tolist() == [9]
    assert [(i, one.reason, one.stop_reason) for i, one in outcome.finished.items()] == [(0, FinishReason.STOP, 9)]
    assert scheduler.load().num_free_blocks == 64


def test_a_result_without_counts_is_no_answer_to_drafts():
    engine, _ = make_engine(max_num_batched_tokens=32)
    scheduler = engine.scheduler
    scheduler.proposer = Fixed(9, 8)
    scheduler.add(Request("a", PROMPT), max_steps_in_flight=1)
    scheduler.plan()
    scheduler.update(StepResult(0, np.array([30], np.int32)))
    scheduler.plan()
    with pytest.raises(AssertionError, match="no counts"):
        scheduler.update(StepResult(1, np.array([9], np.int32)))


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_row_has_no_more_steps_in_flight_than_its_request_allows(num_stages: int):
    engine, _ = make_engine(max_num_batched_tokens=64, max_steps_in_flight=4 * num_stages, num_stages=num_stages)
    scheduler = engine.scheduler
    limits = {"one": 1, "two": 2, "free": None}
    for i, (name, limit) in enumerate(limits.items()):
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        scheduler.add(Request(name, PROMPT[i : i + 8], params), max_steps_in_flight=limit)
    plans, most = [], dict.fromkeys(limits, 0)
    while scheduler.requests:
        while len(plans) < 4 * num_stages and (plan := scheduler.plan()) is not None:
            plans.append(plan)
        for name, state in scheduler.requests.items():
            if state.leader.row >= 0:
                most[name] = max(most[name], int(scheduler.table.in_flight[state.leader.row]))
        plan = plans.pop(0)
        scheduler.update(StepResult(plan.step, np.full(len(plan.sample_rows), 7, np.int32)))
    assert most == {"one": 1, "two": 2, "free": 4}
