"""The engine's thread: terminal deltas, commands between steps, stops and failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from shoal.replicas.engine.engine import Engine
from shoal.replicas.engine.engine_thread import EngineThread
from shoal.replicas.engine.step_times import StepTimesCounter
from shoal.replicas.errors import EngineError, RequestError
from shoal.replicas.plan import StepPlan
from shoal.replicas.protocol import STEP_SECONDS, FinishReason, Request, SamplingParams, StepTimes, TokenDelta
from tests.support.engines import Transcript, make_engine, naive
from tests.support.fake_executor import FakeExecutor

PROMPT = tuple(range(4, 24))
PATIENCE = 30  # seconds until a test gives up


def request(request_id: str, n: int = 1, **sampling) -> Request:
    return Request(request_id, PROMPT, SamplingParams(**{"max_tokens": 12, **sampling}), num_samples=n)


class Client:
    """An engine thread and what came out of it."""

    def __init__(self) -> None:
        self.engine: Engine
        self.executor: FakeExecutor
        self.engine, self.executor = make_engine()
        self.transcript = Transcript()
        self.failures: list[BaseException] = []
        self.failed = threading.Event()
        self._changed = threading.Condition()
        self.thread = EngineThread(self.engine, self._on_deltas, self._on_failure)

    def _on_deltas(self, deltas: list[TokenDelta]) -> None:
        with self._changed:
            self.transcript.add(deltas)
            self._changed.notify_all()

    def _on_failure(self, failure: BaseException) -> None:
        self.failures.append(failure)
        self.failed.set()

    def ended(self, request_id: str, sample: int = 0) -> bool:
        deltas = self.transcript.deltas.get((request_id, sample))
        return bool(deltas) and deltas[-1].finish_reason is not None

    def wait_for(self, *request_ids: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: all(map(self.ended, request_ids)), PATIENCE)

    def close_gate(self) -> threading.Event:
        """Make results wait; the engine's thread is inside a step once it has submitted a plan."""
        self.executor.gate = threading.Event()
        return self.executor.gate


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    client.thread.start()
    yield client
    client.thread.stop(PATIENCE)


def test_requests_from_many_threads_get_their_own_tokens(client: Client):
    requests = [request(str(i), seed=i) for i in range(12)]
    threads = [threading.Thread(target=client.thread.submit, args=(each,)) for each in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.wait_for(*(each.request_id for each in requests))
    assert [client.transcript.outcome(each) for each in requests] == [naive(each) for each in requests]


def test_bad_requests_are_refused_in_the_callers_thread(client: Client):
    with pytest.raises(RequestError, match="empty"):
        client.thread.submit(Request("a", ()))
    assert client.thread.load().num_waiting == 0


def test_an_id_in_use_is_refused_and_its_first_user_undisturbed(client: Client):
    gate = client.close_gate()
    first = request("a", n=2, ignore_eos=True)
    client.thread.submit(first)
    with pytest.raises(RequestError, match="in use"):
        client.thread.submit(request("a"))
    gate.set()
    client.wait_for("a")
    client.thread.call(lambda _: None).result(PATIENCE)
    assert client.transcript.outcome(first) == naive(first)
    client.transcript = Transcript()
    client.thread.submit(first)
    client.wait_for("a")


def test_abort_ends_a_running_request(client: Client):
    gate = client.close_gate()
    client.thread.submit(request("long", n=2, max_tokens=100, ignore_eos=True))
    client.thread.abort("long")
    client.thread.abort("long")
    gate.set()
    client.wait_for("long")
    assert client.transcript.end("long", 0).finish_reason is FinishReason.ABORT
    assert client.thread.call(lambda engine: engine.load().num_free_blocks).result(PATIENCE) == 64
    assert client.transcript.end("long", 1).finish_reason is FinishReason.ABORT


def test_calls_run_between_steps_and_return_their_errors(client: Client):
    assert client.thread.call(lambda engine: engine.reset_prefix_cache()).result(PATIENCE) is True
    with pytest.raises(ZeroDivisionError):
        client.thread.call(lambda _: 1 // 0).result(PATIENCE)


def test_many_arrivals_do_not_hold_up_the_first_of_them():
    client = Client()
    known: list[int] = []  # requests that the engine had accepted when it planned a step
    check = client.executor.on_submit
    assert check is not None

    def submitted(plan: StepPlan) -> None:
        check(plan)
        known.append(len(client.engine.scheduler.requests))

    client.executor.on_submit = submitted
    requests = [request(str(i), max_tokens=2) for i in range(300)]
    for each in requests:
        client.thread.submit(each)
    client.thread.start()
    client.wait_for(*(each.request_id for each in requests))
    client.thread.stop(PATIENCE)
    assert known[0] < len(requests) / 2
    assert [client.transcript.outcome(each) for each in requests] == [naive(each) for each in requests]


def test_the_next_step_is_submitted_before_deltas_are_delivered():
    engine, executor = make_engine()
    events: list[str] = []
    ended = threading.Event()
    executor.on_submit = lambda plan: events.append(f"submit {plan.step}")

    def on_deltas(deltas: list[TokenDelta]) -> None:
        events.append("deliver")
        if deltas[-1].finish_reason is not None:
            ended.set()

    thread = EngineThread(engine, on_deltas, lambda failure: None)
    thread.submit(Request("a", PROMPT[:4], SamplingParams(max_tokens=4, ignore_eos=True)))
    thread.start()
    assert ended.wait(PATIENCE)
    thread.stop(PATIENCE)
    steps = ["submit 0", "submit 1", "submit 2", "deliver", "submit 3", "deliver", "deliver", "deliver"]
    assert events == steps


def test_a_stuck_step_shows_in_last_progress_and_idleness_does_not(client: Client):
    assert client.thread.last_progress == pytest.approx(time.monotonic(), abs=PATIENCE)
    gate = client.close_gate()
    inside = threading.Event()
    check = client.executor.on_submit
    assert check is not None

    def submitted(plan) -> None:
        check(plan)
        inside.set()

    client.executor.on_submit = submitted
    client.thread.submit(request("a"))
    assert inside.wait(PATIENCE)
    stuck_since = client.thread.last_progress
    assert client.thread.last_progress == stuck_since <= time.monotonic()
    gate.set()
    client.wait_for("a")
    client.thread.call(lambda _: None).result(PATIENCE)
    assert client.thread.last_progress > stuck_since


def test_stop_ends_every_sequence(client: Client):
    gate = client.close_gate()
    for i in range(12):  # more than there are rows
        client.thread.submit(request(str(i), n=2, max_tokens=28, ignore_eos=True))
    gate.set()
    client.thread.stop(PATIENCE)
    client.thread.stop(PATIENCE)
    for i in range(12):
        for sample in range(2):
            assert client.ended(str(i), sample)
    with pytest.raises(EngineError, match="stopped"):
        client.thread.submit(request("late"))
    with pytest.raises(EngineError, match="stopped"):
        client.thread.call(lambda _: None)
    client.thread.abort("late")
    assert client.failures == []


def test_a_failure_ends_every_sequence_with_an_error(client: Client):
    client.executor.fail_step = 4
    for i in range(3):
        client.thread.submit(request(str(i), n=2, ignore_eos=True))
    assert client.failed.wait(PATIENCE)
    for i in range(3):
        assert client.transcript.end(str(i)).finish_reason is FinishReason.ERROR
        assert client.transcript.end(str(i), 1).finish_reason is FinishReason.ERROR
    assert [str(failure) for failure in client.failures] == ["the fake step failed"]
    with pytest.raises(EngineError):
        client.thread.submit(request("late"))


def test_a_sequence_that_ended_in_the_step_that_failed_is_told_so(client: Client):
    answer = client.executor.result
    client.executor.result = lambda: replace(answer(), prompt_logprobs=())  # the scores that were asked for are lost
    whole = replace(request("a", n=2, max_tokens=1, prompt_logprobs=0), prompt_token_ids=PROMPT[:8])  # in one step
    client.thread.submit(whole)
    assert client.failed.wait(PATIENCE)
    for sample in range(2):
        assert client.transcript.end("a", sample).finish_reason is FinishReason.ERROR
        assert "the engine failed" in (client.transcript.end("a", sample).error or "")


def test_a_callback_that_raises_is_a_failure():
    engine, _ = make_engine()
    failed = threading.Event()
    failures: list[BaseException] = []

    def raising(deltas: list[TokenDelta]) -> None:
        raise OSError("no listener")

    def on_failure(failure: BaseException) -> None:
        failures.append(failure)
        failed.set()

    thread = EngineThread(engine, raising, on_failure)
    thread.start()
    thread.submit(request("a"))
    assert failed.wait(PATIENCE)
    thread.stop(PATIENCE)
    assert [str(failure) for failure in failures] == ["no listener"]
    assert not engine.scheduler.requests


def test_every_step_is_counted_among_those_of_its_length(client: Client) -> None:
    assert client.thread.load().step_times == StepTimes()
    client.thread.submit(request("1"))
    client.wait_for("1")
    client.thread.abort("unknown")  # what is done between steps is none
    num_steps = client.thread.call(lambda engine: engine.load().num_steps).result(PATIENCE)
    client.thread.stop()
    times = client.thread.load().step_times
    assert sum(times.counts) == num_steps > 1
    longest = max(i for i, count in enumerate(times.counts) if count)
    assert times.seconds <= sum(times.counts) * (*STEP_SECONDS, PATIENCE)[longest]


def test_times_stand_in_the_count_of_the_least_bound_that_holds_them() -> None:
    times = StepTimesCounter()
    for seconds in (STEP_SECONDS[0], STEP_SECONDS[0] + 1e-6, STEP_SECONDS[-1] + 1):
        times.add(seconds)
    assert times.snapshot().counts == (1, 1, *(0,) * (len(STEP_SECONDS) - 2), 1)
