"""Two steps are in flight whenever the engine waits: a device never idles while the host works on results."""

from __future__ import annotations

import pytest

from shoal.replicas.engine.engine import Engine
from shoal.replicas.plan import StepPlan, StepResult
from shoal.replicas.protocol import FinishReason, Request, SamplingParams
from tests.support.engines import EOS, Transcript, make_engine, naive
from tests.support.fake_executor import FakeExecutor

PROMPT = tuple(range(4, 24))


def request(request_id: str, num_tokens: int = 3, max_tokens: int = 12, **sampling) -> Request:
    settings = {"ignore_eos": True, "seed": int(request_id), **sampling}
    return Request(request_id, PROMPT[:num_tokens], SamplingParams(max_tokens=max_tokens, **settings))


def watched_engine(**options) -> tuple[Engine, FakeExecutor, list[int]]:
    """An engine, and how many of its plans were in flight each time that it began to wait for a result."""
    engine, executor = make_engine(**options)
    depths: list[int] = []
    pending: list[StepPlan] = []
    submit, result = executor.submit, executor.result

    def watched_submit(plan: StepPlan) -> None:
        pending.append(plan)
        submit(plan)

    def watched_result() -> StepResult:
        depths.append(len(pending))
        pending.pop(0)
        return result()

    executor.submit, executor.result = watched_submit, watched_result
    return engine, executor, depths


def num_samples_planned(executor: FakeExecutor) -> int:
    return sum(len(plan.sample_rows) for plan in executor.plans)


def test_arrivals_chunks_and_ends_leave_no_gap():
    engine, executor, depths = watched_engine(max_num_batched_tokens=8)
    requests = [request("0", max_tokens=30)]
    engine.add_request(requests[0])
    transcript = Transcript()
    for i in range(1, 6):  # prompts of up to three chunks beside what decodes, ending at different steps
        transcript.add(engine.step())
        requests.append(request(str(i), num_tokens=4 * i, max_tokens=2 + i))
        engine.add_request(requests[-1])
    transcript.run(engine)
    assert [transcript.outcome(each) for each in requests] == [naive(each) for each in requests]
    assert any((plan.num_tokens > 1).any() and (plan.num_tokens == 1).any() for plan in executor.plans), "no mixed step"
    assert depths == [2] * (len(depths) - 1) + [1]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_an_end_by_length_wastes_no_sample(max_tokens: int):
    engine, executor, _ = watched_engine()
    engine.add_request(request("0", max_tokens=max_tokens))
    Transcript().run(engine)
    assert num_samples_planned(executor) == max_tokens


def test_an_end_at_a_stop_token_wastes_one_sample():
    engine, executor, _ = watched_engine()
    stopping = request("0", max_tokens=100, ignore_eos=False)
    engine.add_request(stopping)
    transcript = Transcript().run(engine)
    assert transcript.end("0").finish_reason is FinishReason.STOP
    tokens = transcript.tokens("0")
    assert tokens[-1] == EOS
    assert num_samples_planned(executor) == len(tokens) + 1


def test_a_request_is_in_the_first_plan_after_it_arrived():
    engine, executor, _ = watched_engine()
    engine.add_request(request("0", max_tokens=50))
    engine.step()
    num_planned = len(executor.plans)
    engine.add_request(request("1", num_tokens=5))
    engine.step()
    assert executor.plans[num_planned].num_tokens.tolist() == [1, 5]
