"""The scheduler keeps the stages of a pipeline busy: rows take turns, prefills run with any plan."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import numpy as np
import pytest

from shoal.replicas.engine.scheduler import Scheduler
from shoal.replicas.plan import DEVICE_TOKEN, StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.engines import make_engine

PROMPT = tuple(range(4, 24))


def request(name: str, prompt: tuple[int, ...] = PROMPT[:6], n: int = 1, **sampling) -> Request:
    params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **sampling})
    return Request(name, prompt, params, num_samples=n)


class Pipeline:
    """A scheduler with two plans a stage in flight whenever the oldest is answered."""

    def __init__(self, num_stages: int, **sizes: int) -> None:
        self.num_stages = num_stages
        sizes = {"num_blocks": 256, "max_num_seqs": 16, "max_num_batched_tokens": 64, **sizes}
        self.scheduler: Scheduler = make_engine(num_stages=num_stages, **sizes)[0].scheduler
        self.in_flight: deque[StepPlan] = deque()
        self.plans: list[StepPlan] = []

    def fill(self) -> None:
        """Submit up to two plans a stage."""
        while len(self.in_flight) < 2 * self.num_stages and (plan := self.scheduler.plan()) is not None:
            self.in_flight.append(plan)
            self.plans.append(plan)

    def step(self) -> None:
        self.fill()
        plan = self.in_flight.popleft()
        self.scheduler.update(StepResult(plan.step, np.full(len(plan.sample_rows), 7, np.int32)))

    def run(self, num_steps: int) -> list[StepPlan]:
        """The plans of so many steps."""
        first = len(self.plans)
        for _ in range(num_steps):
            self.step()
        return self.plans[first:]

    def waits(self) -> list[int]:
        """For each DEVICE_TOKEN of a plan: how many plans earlier it was sampled."""
        sampled: dict[int, int] = {}
        waits = []
        for index, plan in enumerate(self.plans):
            for row, token in zip(plan.rows.tolist(), plan.token_ids.tolist(), strict=False):
                if token == DEVICE_TOKEN and row in sampled:
                    waits.append(index - sampled[row])
            sampled.update(dict.fromkeys(plan.sample_rows.tolist(), index))
        return waits


@pytest.mark.parametrize("num_stages", [2, 4])
def test_a_row_comes_again_when_all_stages_have_run_it(num_stages: int):
    pipeline = Pipeline(num_stages)
    for i in range(10):
        pipeline.scheduler.add(request(str(i)))
    pipeline.run(2 * num_stages)
    pipeline.plans.clear()
    plans = pipeline.run(4 * num_stages)
    assert min(pipeline.waits()) >= num_stages
    for first, second in pairwise(plans):
        assert not set(first.rows.tolist()) & set(second.rows.tolist())
    sizes = [len(plan.rows) for plan in plans]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes[:num_stages]) == 10


@pytest.mark.parametrize("num_stages", [2, 4])
def test_every_stage_has_a_plan(num_stages: int):
    pipeline = Pipeline(num_stages)
    for i in range(num_stages):
        pipeline.scheduler.add(request(str(i)))
    for _ in range(30):
        pipeline.step()
        pipeline.fill()
        assert len(pipeline.in_flight) >= num_stages


def test_one_row_goes_on_without_the_host_and_new_requests_wait_for_two_of_its_plans():
    pipeline = Pipeline(4)
    pipeline.scheduler.add(request("alone"))
    pipeline.run(3)
    pipeline.fill()
    assert [plan.token_ids.tolist() for plan in pipeline.in_flight] == [[DEVICE_TOKEN]] * 2


def test_the_chunks_of_one_prompt_fill_all_stages():
    pipeline = Pipeline(2, max_num_batched_tokens=4, max_num_seqs=4)
    pipeline.scheduler.add(request("long", PROMPT))
    pipeline.fill()
    assert [plan.starts.tolist() for plan in pipeline.in_flight] == [[0], [4], [8], [12]]


def prefilled(plans: list[StepPlan]) -> list[int]:
    return [int(plan.num_tokens[plan.num_tokens > 1].sum()) for plan in plans]


def test_what_waits_to_be_prefilled_is_spread_over_plans():
    pipeline = Pipeline(2, max_num_batched_tokens=1024, num_blocks=4096, max_model_len=4096, block_size=16)
    prompt = tuple(range(4, 84)) * 50
    pipeline.scheduler.add(request("long", prompt))
    assert prefilled(pipeline.run(14))[:14] == [500, 438, 383, 335, 293, 257, *[256] * 7, 2]
    for i in range(16):  # more than eight plans can take: each takes what fits beside the decodes
        pipeline.scheduler.add(request(str(i), prompt[i + 1 :]))
    assert min(prefilled(pipeline.run(8))) >= 1022


def test_requests_that_cannot_have_rows_do_not_make_plans_larger():
    pipeline = Pipeline(2, max_num_batched_tokens=1024, num_blocks=4096, max_model_len=4096, max_num_seqs=2)
    for i in range(9):
        pipeline.scheduler.add(request(str(i), tuple(range(4, 84)) * 10, n=1 + (i == 1)))
    assert prefilled(pipeline.run(4))[:4] == [256, 256, 256, 32]


def test_prefills_go_with_the_decodes_of_any_micro_batch():
    pipeline = Pipeline(2, max_num_batched_tokens=6, max_num_seqs=4)
    for name in ("one", "two"):
        pipeline.scheduler.add(request(name))
    pipeline.run(8)
    pipeline.scheduler.add(request("long", PROMPT[::-1]))
    plans = pipeline.run(4)
    assert [plan.num_tokens.tolist() for plan in plans] == [[1, 5]] * 4
    assert plans[0].rows[0] != plans[1].rows[0]


def test_a_micro_batch_that_has_emptied_gets_rows_of_another():
    pipeline = Pipeline(2)
    for i in range(6):
        pipeline.scheduler.add(request(str(i), PROMPT[i : i + 6]))
    pipeline.run(4)
    micro_batch = pipeline.scheduler.table.micro_batch
    for name, state in list(pipeline.scheduler.requests.items()):
        if micro_batch[state.leader.row] == 0:
            pipeline.scheduler.abort(name)
    assert len(pipeline.scheduler.requests) == 3
    pipeline.run(4)
    pipeline.plans.clear()
    assert [len(plan.rows) for plan in pipeline.run(4)] in ([1, 2, 1, 2], [2, 1, 2, 1])
    assert set(pipeline.waits()) == {2}


def test_forks_share_a_prompt_across_micro_batches():
    pipeline = Pipeline(2, block_size=8)
    pipeline.scheduler.add(request("a", PROMPT, n=4))  # 20 tokens: the third block is written by all four
    pipeline.run(6)
    state = pipeline.scheduler.requests["a"]
    assert sorted(pipeline.scheduler.table.micro_batch[[fork.row for fork in state.sequences]].tolist()) == [0, 0, 1, 1]
    assert state.num_copied == 3
    pipeline.scheduler.check()


def test_a_preempted_row_comes_back():
    pipeline = Pipeline(2, num_blocks=16, block_size=4, max_model_len=48)
    for i in range(3):
        pipeline.scheduler.add(request(str(i), PROMPT[i : i + 8], max_tokens=30))
    for _ in range(300):
        if not pipeline.scheduler.requests:
            break
        pipeline.step()
    assert not pipeline.scheduler.requests
    assert pipeline.scheduler.counters.preemptions > 0
