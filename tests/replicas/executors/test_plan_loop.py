"""A rank's loop tells the engine whatever goes wrong, in whichever of its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from shoal.replicas.channel.step_channel import PeerLost
from shoal.replicas.errors import EngineError
from shoal.replicas.executors.plan_loop import run_plans
from shoal.replicas.plan import StepPlan, StepResult
from tests.support.step_group import Group, answer, run_in_thread
from tests.support.steps import decode_plan, same


@dataclass
class Step:
    plan: StepPlan
    outcome: StepResult | Exception

    def result(self) -> StepResult:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class FakeShard:
    """Answers every plan but that of step 1, whose outcome is given; launching step 1 may fail too."""

    def __init__(self, outcome: StepResult | Exception, *, at_launch: bool = False) -> None:
        self._outcome, self._at_launch = outcome, at_launch

    def launch(self, plan: StepPlan) -> Step:
        if plan.step != 1:
            return Step(plan, answer(plan))
        if self._at_launch:
            assert isinstance(self._outcome, Exception)
            raise self._outcome
        return Step(plan, self._outcome)


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group(1)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        (FakeShard(RuntimeError("out of memory"), at_launch=True), "RuntimeError: out of memory"),
        (FakeShard(RuntimeError("illegal address")), "RuntimeError: illegal address"),
        (FakeShard(StepResult(1, np.ones(2, np.float32))), "FrameError: StepResult of step 1 does not fit"),
    ],
    ids=["launch", "result", "answer"],
)
def test_a_step_that_fails_is_told_with_its_reason(group: Group, shard: FakeShard, said: str) -> None:
    loop = run_in_thread(lambda: run_plans(group.clients[0], shard, lambda: None, answers=True))
    group.server.submit(decode_plan(0))
    group.server.submit(decode_plan(1))
    with pytest.raises(EngineError, match=f"step 1 failed on rank 0: {said}"):
        [group.server.result() for _ in range(2)]  # the first may have come in time
    group.server.close()
    loop.exception(30)


def test_a_loop_ends_when_the_engine_does(group: Group) -> None:
    shard = FakeShard(answer(decode_plan(1)))
    loop = run_in_thread(lambda: run_plans(group.clients[0], shard, lambda: None, answers=True))
    group.server.submit(decode_plan(0))
    assert same(group.server.result(), answer(decode_plan(0)))
    group.server.close()
    loop.result(30)


def test_a_loop_whose_engine_is_lost_says_so(group: Group) -> None:
    ready = threading.Event()

    def check() -> None:
        ready.set()

    shard = FakeShard(answer(decode_plan(1)))
    loop = run_in_thread(lambda: run_plans(group.clients[0], shard, check, answers=False))
    group.server.submit(decode_plan(0))
    assert ready.wait(30)
    for rank in group.server._ranks:
        rank.sock.close()
    with pytest.raises(PeerLost):
        loop.result(30)


def test_a_failure_that_nobody_hears_is_not_lost(group: Group) -> None:
    """The rank's log has the reason why its step failed, not that the engine was gone by then."""

    class HungUp(FakeShard):
        def launch(self, plan: StepPlan) -> Step:
            for rank in group.server._ranks:
                rank.sock.close()
            raise RuntimeError("out of memory")

    shard = HungUp(answer(decode_plan(1)))
    loop = run_in_thread(lambda: run_plans(group.clients[0], shard, lambda: None, answers=False))
    group.server.submit(decode_plan(0))
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.result(30)
