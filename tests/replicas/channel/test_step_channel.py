"""Plans and results between an engine and its ranks, and how a channel ends."""

from __future__ import annotations

import contextlib
import select
from collections.abc import Iterator

import numpy as np
import pytest

from shoal.replicas.channel import step_channel
from shoal.replicas.channel.step_channel import ChannelClosed, PeerLost, StepChannelClient, StepChannelServer
from shoal.replicas.channel.step_frames import FrameError
from shoal.replicas.engine.engine import Engine
from shoal.replicas.errors import EngineError
from shoal.replicas.plan import LogprobArrays, RowStart, StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.engines import EOS, VOCAB_SIZE, Transcript, make_engine, naive
from tests.support.fake_executor import FakeExecutor
from tests.support.step_group import HOSTS, TOKEN, Group, answer, blocked, run_in_thread
from tests.support.steps import decode_plan, same


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()


def large_plan(step: int, num_ints: int) -> StepPlan:
    start = RowStart(0, 1, num_ints, SamplingParams(frequency_penalty=1.0), tuple(range(num_ints)))
    return decode_plan(step)._replace(row_starts=(start,))


def large_result(step: int, num_tokens: int) -> StepResult:
    ints, floats = np.arange(num_tokens, dtype=np.int32), np.arange(num_tokens, dtype=np.float32)
    tops = LogprobArrays(ints, floats, ints, np.stack([ints] * 20, 1), np.stack([floats] * 20, 1))
    return StepResult(step, np.ones(1, np.int32), prompt_logprobs=(tops,))


@HOSTS
def test_every_rank_gets_every_plan_and_one_answers(host: str | None) -> None:
    group = Group(3, host, result_rank=2)
    plans = [decode_plan(step, 32) for step in range(10, 14)]
    for plan in plans:
        group.server.submit(plan)
    for client in group.clients:
        received = [client.receive() for _ in plans]
        assert same(tuple(received), tuple(plans))
    for plan in plans:
        group.clients[2].send_result(answer(plan))
    assert same(tuple(group.server.result() for _ in plans), tuple(map(answer, plans)))
    group.server.close()
    for client in group.clients:
        assert client.receive() is None
        assert client.receive() is None
        client.close()


def test_ranks_of_one_group_may_come_by_unix_socket_and_by_tcp() -> None:
    server = StepChannelServer(2, TOKEN, host="127.0.0.1")
    addresses = (server.path, server.address)
    coming = [run_in_thread(StepChannelClient, address, rank, 2, TOKEN) for rank, address in enumerate(addresses)]
    server.accept(30)
    server.submit(decode_plan(0))
    for future in coming:
        assert same(future.result(30).receive(), decode_plan(0))
        future.result().close()
    server.close()


class ChannelExecutor:
    """Plans go through a channel to two ranks, each with a fake model; implements `Executor`."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int) -> None:
        self.num_blocks = num_blocks
        self.group = Group(2)
        models = [FakeExecutor(num_blocks, block_size, max_rows, 64, VOCAB_SIZE, (EOS,)) for _ in self.group.clients]
        self.ranks = [run_in_thread(self.serve, *pair) for pair in zip(self.group.clients, models, strict=True)]
        self.submit, self.result = self.group.server.submit, self.group.server.result

    def serve(self, client: StepChannelClient, model: FakeExecutor) -> int:
        num_steps = 0
        while (plan := client.receive()) is not None:
            model.submit(plan)
            result = model.result()
            if client is self.group.clients[0]:
                client.send_result(result)
            num_steps += 1
        return num_steps

    def shutdown(self) -> None:
        self.group.server.close()


def test_an_engine_that_works_through_a_channel_gives_the_tokens_of_the_naive_loop() -> None:
    """Chunks, preemption, forks, scored prompts: everything that a plan can hold crosses the channel."""
    local, _ = make_engine(num_blocks=20, max_num_seqs=4, max_model_len=64)
    executor = ChannelExecutor(20, 4, 4)
    engine = Engine(local.config, local.facts, executor)
    requests = [
        Request("fork", tuple(range(5, 25)), SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=2), 3),
        Request("emitted", (5, 6, 7), SamplingParams(max_tokens=20, bad_words=((1, 2),), logit_bias=((3, -1.0),))),
        Request("long", tuple(range(5, 35)), SamplingParams(max_tokens=20, stop_token_ids=(4,), seed=2**64 - 1)),
    ]
    for request in requests:
        engine.add_request(request)
    transcript = Transcript().run(engine)
    for request in requests:
        assert transcript.outcome(request) == naive(request)
    engine.shutdown()
    num_steps = {rank.result(30) for rank in executor.ranks}
    assert len(num_steps) == 1
    executor.group.close()


@HOSTS
def test_frames_larger_than_the_buffers_pass_in_both_directions_at_once(host: str | None) -> None:
    """A rank that sends a large result before it takes the next plan must not block an engine that is sending it."""
    group = Group(2, host)

    def work(client: StepChannelClient, answers: bool) -> list[int]:
        sizes = []
        while (plan := client.receive()) is not None:
            sizes.append(len(plan.row_starts[0].prompt_token_ids))
            if answers:
                client.send_result(large_result(plan.step, 100_000))
        return sizes

    ranks = [run_in_thread(work, client, client is group.clients[0]) for client in group.clients]
    for step in range(4):
        group.server.submit(large_plan(step, 400_000))
    for step in range(4):
        assert same(group.server.result(), large_result(step, 100_000))
    group.server.close()
    assert [rank.result(30) for rank in ranks] == [[400_000] * 4] * 2
    group.close()


@pytest.mark.parametrize("sizes", [[2700, 1, 2600, 4, 4], [1], [2728] * 3, [10_000, 3, 10_000]], ids=str)
def test_frames_of_all_sizes_follow_one_another(group: Group, sizes: list[int]) -> None:
    """As many as the staging buffer holds, and some that it does not."""
    plans = [decode_plan(step, size) for step, size in enumerate(sizes)]
    sending = run_in_thread(lambda: [group.server.submit(plan) for plan in plans])
    other = run_in_thread(lambda: [group.clients[1].receive() for _ in plans])
    assert same(tuple(group.clients[0].receive() for _ in plans), tuple(plans))
    sending.result(30)
    other.result(30)


def test_received_plans_keep_their_values(group: Group) -> None:
    plans = [decode_plan(step, 8 + step) for step in range(50)]
    for plan in plans:
        group.server.submit(plan)
    received = [group.clients[0].receive() for _ in plans]
    assert same(tuple(received), tuple(plans))


def test_steps_must_follow_one_another(group: Group) -> None:
    group.server.submit(decode_plan(7))
    group.server.submit(decode_plan(9))
    assert group.clients[1].receive() is not None
    with pytest.raises(FrameError, match="rank 1 was sent step 9 after step 7"):
        group.clients[1].receive()


def test_results_must_follow_one_another(group: Group) -> None:
    for step in (3, 4):
        group.server.submit(decode_plan(step))
    group.clients[0].send_result(answer(decode_plan(4)))
    with pytest.raises(FrameError, match=r"of step 4; steps in flight: \[3, 4\]"):
        group.server.result()
    with pytest.raises(FrameError, match="of step 4"):  # it stays so
        group.server.submit(decode_plan(5))


def test_only_the_rank_that_samples_answers(group: Group) -> None:
    group.server.submit(decode_plan(3))
    group.clients[1].send_result(answer(decode_plan(3)))
    with pytest.raises(FrameError, match="rank 1 sent a StepResult; only rank 0 answers"):
        group.server.result()


def test_any_rank_can_say_that_a_step_failed(group: Group) -> None:
    group.server.submit(decode_plan(3))
    group.clients[1].send_failure(3, "out of memory: 12 MiB")
    with pytest.raises(EngineError, match="step 3 failed on rank 1: out of memory: 12 MiB"):
        group.server.result()


def test_what_a_rank_said_before_it_ended_is_why_it_is_gone(group: Group) -> None:
    group.server.submit(decode_plan(3))
    group.clients[1].send_failure(3, "out of memory")
    group.clients[1].close()
    with pytest.raises(EngineError, match="step 3 failed on rank 1: out of memory"):
        group.server.submit(decode_plan(4))


def test_a_plan_that_does_not_fit_leaves_the_channel_as_it_was(group: Group) -> None:
    with pytest.raises(FrameError, match="step 3 does not fit"):
        group.server.submit(decode_plan(3)._replace(rows=np.zeros(4, np.int64)))
    group.server.submit(decode_plan(3))
    assert same(group.clients[0].receive(), decode_plan(3))


def test_a_result_is_asked_for_only_where_one_is_due(group: Group) -> None:
    with pytest.raises(EngineError, match="no plan is in flight"):
        group.server.result()
    with pytest.raises(EngineError, match="all 2 ranks have been accepted already"):
        group.server.accept(1)


def test_nothing_is_sent_before_the_ranks_are_there() -> None:
    with contextlib.closing(StepChannelServer(2, TOKEN)) as server, pytest.raises(EngineError, match="no rank of 2"):
        server.submit(decode_plan(0))


def test_close_wakes_an_engine_that_waits(group: Group) -> None:
    group.server.submit(decode_plan(0))
    waiting = blocked(group.server.result)
    group.server.close()
    group.server.close()
    with pytest.raises(ChannelClosed):
        waiting.result(30)
    with pytest.raises(ChannelClosed):
        group.server.submit(decode_plan(1))
    assert group.clients[0].receive() is not None  # what was sent before is not lost
    assert group.clients[0].receive() is None


def test_close_wakes_an_engine_that_sends_to_ranks_that_do_not_listen(group: Group) -> None:
    sending = run_in_thread(group.server.submit, large_plan(0, 2_000_000))
    assert select.select([group.clients[0]._sock], [], [], 30)[0]
    group.server.close()
    with pytest.raises(ChannelClosed):
        sending.result(30)
    with pytest.raises(PeerLost, match="engine of rank 0 is gone"):  # not an orderly end: half a plan came
        group.clients[0].receive()


def test_a_channel_whose_wait_was_given_up_sends_no_more(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a plan may have gone out: the next one would be read as the rest of it."""
    monkeypatch.setattr(step_channel, "_SILENCE_MS", 1)

    def give_up() -> None:
        raise EngineError("a step takes too long")

    with pytest.raises(EngineError, match="too long"):
        group.server.submit(large_plan(0, 2_000_000), give_up)
    with pytest.raises(EngineError, match="too long"):
        group.server.submit(decode_plan(1), lambda: pytest.fail("it is being sent"))


def test_close_wakes_an_engine_that_waits_for_its_ranks() -> None:
    server = StepChannelServer(1, TOKEN)
    waiting = blocked(lambda: server.accept(60))
    server.close()
    with pytest.raises(ChannelClosed):
        waiting.result(30)


@HOSTS
def test_close_wakes_a_rank_that_waits(host: str | None) -> None:
    group = Group(2, host)
    waiting = blocked(group.clients[1].receive)
    group.clients[1].close()
    group.clients[1].close()
    with pytest.raises(ChannelClosed, match="rank 1 is closed"):
        waiting.result(30)
    with pytest.raises(ChannelClosed):
        group.clients[1].send_failure(0, "too late")
    with pytest.raises(ChannelClosed):
        group.clients[1].receive()
    group.close()


@pytest.mark.parametrize("end", ["engine", "rank"])
def test_who_watches_for_the_end_hears_of_it(group: Group, end: str) -> None:
    client = group.clients[0]
    watching = blocked(client.wait_for_hang_up)
    (group.server if end == "engine" else client).close()
    watching.result(30)
    client.close()
    client.wait_for_hang_up()  # as by a thread that comes too late
