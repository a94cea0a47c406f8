"""After the loss of a replica the reader receives the same tokens, once each, from another one."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.replay import ReplayLog
from shoal.cluster.wire.frames import StreamDelta
from shoal.replicas.protocol import FinishReason, Request, TokenDelta
from tests.support.cluster import Cluster, cluster, eventually, in_loop, request, tokens
from tests.support.fake_replica import fake_output, fake_token


async def lose(c: Cluster, index: int) -> None:
    """Simulate the end of a replica's process for the router."""
    await c.replicas[index].close()


def busy(c: Cluster) -> int:
    """The replica with running requests."""
    (index,) = [i for i, running in enumerate(c.running()) if running]
    return index


@in_loop
async def test_the_stream_goes_on_with_the_same_tokens() -> None:
    async with cluster(2) as c:
        asked = request(samples=3, max_tokens=20, logprobs=0)
        stream = c.router.generate("fake", asked)
        deltas: list[TokenDelta] = []

        async def read() -> list[TokenDelta]:
            async for new in stream:
                deltas.extend(new)
            return deltas

        reader = asyncio.ensure_future(read())
        await eventually(lambda: 1 in c.running() or 3 in c.running())
        lost = busy(c)
        for _ in range(7):
            c.step()
        await eventually(lambda: len(deltas) == 21)
        await lose(c, lost)
        await c.run(reader)
        for sample in range(3):
            assert tokens(deltas, sample) == fake_output(asked, sample)
            assert [d.logprobs[0].token_id for d in deltas if d.sample == sample and d.logprobs] == [
                *fake_output(asked, sample)
            ]
            assert sum(d.num_cached_tokens for d in deltas if d.sample == sample) == 16
        replayed = c.replicas[1 - lost].engine.requests
        assert sorted(r.first_sample for r in replayed) == [0, 1, 2]
        assert all(len(r.emitted_token_ids) == 7 and r.num_samples == 1 for r in replayed)


@in_loop
async def test_a_request_without_output_is_replayed_whole() -> None:
    async with cluster(2) as c:
        asked = request(samples=4)
        task = c.generate(asked)
        await eventually(lambda: sum(c.running()) == 4)
        lost = busy(c)
        await lose(c, lost)
        (deltas,) = await c.run(task)
        assert [tokens(deltas, i) for i in range(4)] == [fake_output(asked, i) for i in range(4)]
        assert c.replicas[1 - lost].engine.requests == [asked]


@in_loop
async def test_many_streams_survive_one_loss_after_another() -> None:
    async with cluster(4) as c:
        asked = [request(f"r{i}", prompt=(i, i), seed=i, max_tokens=30, samples=1 + i % 2) for i in range(16)]
        tasks = [c.generate(r) for r in asked]
        for lost in range(3):
            await eventually(lambda: sum(c.running()) == 24)
            for _ in range(5):
                c.step()
            await lose(c, lost)
        for r, deltas in zip(asked, await c.run(*tasks), strict=True):
            for sample in range(r.num_samples):
                assert tokens(deltas, sample) == fake_output(r, sample)


@in_loop
async def test_above_the_limit_the_request_ends_with_an_error() -> None:
    async with cluster(2, options=RouterOptions(replay_limit=0)) as c:
        task = c.generate(request("poison"))
        await eventually(lambda: sum(c.running()) == 1)
        await lose(c, busy(c))
        deltas = await task
        assert [d.finish_reason for d in deltas] == [FinishReason.ERROR]
        assert "poison lost 1 replicas" in (deltas[0].error or "")


@in_loop
async def test_without_another_replica_the_stream_waits_for_one_up_to_the_deadline() -> None:
    async with cluster(options=RouterOptions(replay_timeout=0.05)) as c:
        stream = c.router.generate("fake", request())
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: c.running() == [1])
        c.step()
        await first
        await lose(c, 0)
        (last,) = [delta async for deltas in stream for delta in deltas]
        assert last.finish_reason is FinishReason.ERROR
        assert "no replica of fake had free capacity" in (last.error or "")


@in_loop
async def test_a_replica_that_comes_in_time_takes_over() -> None:
    async with cluster() as c:
        task = c.generate(request(max_tokens=10))
        await eventually(lambda: c.running() == [1])
        await lose(c, 0)
        await c.add()
        (deltas,) = await c.run(task)
        assert tokens(deltas) == fake_output(request(max_tokens=10))


@in_loop
async def test_a_silent_replica_counts_as_lost() -> None:
    options = RouterOptions(heartbeat_interval=0.02, heartbeat_timeout=0.2)
    async with cluster(2, options=options) as c:
        task = c.generate(request(max_tokens=10))
        await eventually(lambda: sum(c.running()) == 1)
        silent = busy(c)
        for session in c.replicas[silent].server._sessions:
            transport = session.connection._transport
            assert transport is not None
            transport.pause_reading()  # as a stopped process: the socket stands, and nothing comes back
        await eventually(lambda: c.running()[1 - silent] == 1)
        while not task.done():
            c.replicas[1 - silent].engine.step()
            await asyncio.sleep(0)
        assert tokens(task.result()) == fake_output(request(max_tokens=10))


def _run(asked: Request, steps: int) -> list[StreamDelta]:
    """The output of a replica for `asked` in its first `steps` steps."""
    deltas = []
    for step in range(steps):
        for sample in range(asked.first_sample, asked.first_sample + asked.num_samples):
            position = len(asked.emitted_token_ids) + step
            if position < asked.sampling.max_tokens:
                last = position + 1 == asked.sampling.max_tokens
                reason = FinishReason.LENGTH if last else None
                deltas.append(StreamDelta(1, sample, (fake_token(asked, sample, position),), reason))
    return deltas


@given(st.integers(1, 4), st.integers(1, 8), st.lists(st.integers(0, 12), max_size=3), st.integers(0, 3))
def test_any_loss_at_any_point_gives_the_undisturbed_output(
    num_samples: int, max_tokens: int, cuts: list[int], first_sample: int
) -> None:
    asked = replace(request(samples=num_samples, max_tokens=max_tokens), first_sample=first_sample)
    log = ReplayLog(asked)
    seen: list[TokenDelta] = []
    lives = [asked]
    for cut in [*cuts, 100]:
        following = []
        for life in lives:
            sent = _run(life, 100)[:cut]
            seen += [delta for d in sent if (delta := log.record(d))]
            samples = range(life.first_sample, life.first_sample + life.num_samples)
            seen += log.complete(samples)
            following += log.remaining(samples)
        lives = following
    assert log.num_open == 0
    for sample in log.samples:
        assert tokens(seen, sample) == fake_output(asked, sample)
        assert sum(d.finish_reason is not None for d in seen if d.sample == sample) == 1


def test_a_lost_last_word_is_made_up() -> None:
    asked = request(max_tokens=3, samples=2)
    log = ReplayLog(asked)
    for token in (1, 2, 3):
        log.record(StreamDelta(1, 0, (token,)))
    (end,) = log.complete(log.samples)
    assert (end.sample, end.finish_reason, end.token_ids) == (0, FinishReason.LENGTH, ())
    assert [r.first_sample for r in log.remaining(log.samples)] == [1]


def test_prompt_logprobs_are_asked_for_once() -> None:
    asked = request(samples=2, prompt_logprobs=1)
    log = ReplayLog(asked)
    assert log.remaining(log.samples) == [asked]
    log.record(StreamDelta(1, 1, (4,)))
    first, second = log.remaining(log.samples)
    assert (first.sampling.prompt_logprobs, second.sampling.prompt_logprobs) == (1, None)
    log.record(StreamDelta(1, 0, (4,), prompt_logprobs=(None,)))
    assert [r.sampling.prompt_logprobs for r in log.remaining(log.samples)] == [None, None]


def test_deltas_after_the_end_are_dropped() -> None:
    log = ReplayLog(request())
    assert log.record(StreamDelta(1, 0, (4,), FinishReason.STOP)) is not None
    assert log.record(StreamDelta(1, 0, (5,))) is None
    assert log.record(StreamDelta(1, 9, (5,))) is None
