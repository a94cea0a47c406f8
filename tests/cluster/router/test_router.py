"""The router over the real wire and fake engines: streams, aborts, placement, queue, replay."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.routed_request import RequestTimes
from shoal.cluster.wire.errors import NoReplica, QueueFull
from shoal.replicas.errors import PromptTooLong, UnknownModel
from shoal.replicas.protocol import FinishReason, TokenDelta
from tests.support.cluster import cluster, collect, eventually, in_loop, request, tokens
from tests.support.fake_replica import fake_output


async def rest(stream: AsyncIterator[list[TokenDelta]]) -> list[TokenDelta]:
    return [delta async for deltas in stream for delta in deltas]


@in_loop
async def test_streams_every_sample_to_its_end() -> None:
    async with cluster(2) as c:
        asked = [request(f"r{i}", prompt=(i, 2), samples=1 + i % 3, seed=i) for i in range(12)]
        results = await c.run(*(c.generate(r) for r in asked))
        for r, deltas in zip(asked, results, strict=True):
            assert {delta.request_id for delta in deltas} == {r.request_id}
            for sample in range(r.num_samples):
                assert tokens(deltas, sample) == fake_output(r, sample)
                ends = [d.finish_reason for d in deltas if d.sample == sample and d.finish_reason is not None]
                assert ends == [FinishReason.LENGTH]
                assert [d.num_cached_tokens for d in deltas if d.sample == sample][:2] == [16, 0]


@in_loop
async def test_deltas_come_as_the_engine_steps() -> None:
    async with cluster() as c:
        stream = c.router.generate("fake", request(max_tokens=2))
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: c.running() == [1])
        assert not first.done()
        c.step()
        (delta,) = await first
        assert (len(delta.token_ids), delta.finish_reason) == (1, None)
        c.step()
        (delta,) = await anext(stream)
        assert delta.finish_reason is FinishReason.LENGTH
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


@in_loop
async def test_a_refusal_has_its_class_and_comes_before_the_first_item() -> None:
    async with cluster(max_model_len=10) as c:
        with pytest.raises(PromptTooLong, match="11 tokens are above the context of 10") as caught:
            await collect(c.router, request(prompt=(1,) * 3, max_tokens=8))
        assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")
        with pytest.raises(UnknownModel, match="models are: fake"):
            await anext(c.router.generate("other", request()))


@in_loop
async def test_closing_a_stream_aborts_it_on_the_replica() -> None:
    async with cluster() as c:
        async with aclosing(c.router.generate("fake", request("gone", max_tokens=1000))) as stream:
            first = asyncio.ensure_future(anext(stream))
            await eventually(lambda: c.running() == [1])
            c.step()
            await first
        await eventually(lambda: c.replicas[0].engine.aborted == ["gone"])
        assert c.running() == [0]
        c.step()
        await eventually(lambda: c.replicas[0].server.num_streams == 0)


@in_loop
async def test_one_sample_ends_and_the_others_go_on() -> None:
    async with cluster() as made:
        asked = request(max_tokens=8, samples=3)
        stream = made.router.generate("fake", asked)
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: made.running() == [3])
        made.step()
        deltas = list(await first)
        made.router.end_sample("r", 1)
        await eventually(lambda: made.running() == [2])
        [more] = await made.run(rest(stream))
        deltas += more
        assert [tokens(deltas, i) for i in (0, 2)] == [fake_output(asked, 0), fake_output(asked, 2)]
        assert tokens(deltas, 1) == fake_output(asked, 1)[:1]
        assert [delta.sample for delta in deltas if delta.finish_reason is not None] == [0, 2]
        assert made.replicas[0].server.num_streams == 0
        made.router.end_sample("r", 0)  # it has ended: nothing happens


@in_loop
async def test_a_request_ends_with_its_last_sample() -> None:
    async with cluster() as made:
        stream = made.router.generate("fake", request(max_tokens=8, samples=2), times=(times := RequestTimes()))
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: made.running() == [2])
        made.step()
        await first
        made.router.end_sample("r", 0)
        made.router.end_sample("r", 1)
        assert [delta async for delta in stream] == []
        assert times.finished is not None
        await eventually(lambda: made.running() == [0])


@in_loop
async def test_a_sample_that_its_reader_ended_is_not_replayed() -> None:
    async with cluster(2) as made:
        asked = request(max_tokens=8, samples=2)
        stream = made.router.generate("fake", asked)
        first = asyncio.ensure_future(anext(stream))
        await eventually(lambda: sum(made.running()) == 2)
        made.step()
        deltas = list(await first)
        made.router.end_sample("r", 1)
        [lost] = [replica for replica in made.replicas if replica.engine.requests]
        await lost.close()
        [more] = await made.run(rest(stream))
        [other] = [replica for replica in made.replicas if replica is not lost]
        assert [replayed.first_sample for replayed in other.engine.requests] == [0]
        assert tokens(deltas + more, 0) == fake_output(asked, 0)


@in_loop
async def test_cancelling_a_queued_request_takes_it_out_of_the_queue() -> None:
    async with cluster(options=RouterOptions(max_waiting_per_replica=0), max_num_seqs=1) as c:
        first, second, third = (c.generate(request(name)) for name in "abc")
        await eventually(lambda: c.running() == [1])
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await c.run(first, third)
        assert [r.request_id for r in c.replicas[0].engine.requests] == ["a", "c"]


@in_loop
async def test_closing_the_router_aborts_what_it_asked_for() -> None:
    async with cluster() as c:
        task = c.generate(request("r", max_tokens=1000))
        await eventually(lambda: c.running() == [1])
        await c.router.close()
        await eventually(lambda: c.replicas[0].engine.aborted == ["r"])
        task.cancel()


@in_loop
async def test_equal_requests_spread_and_equal_prefixes_stay() -> None:
    async with cluster(2) as c:
        spread = [c.generate(request(f"s{i}", prompt=(i,) * 40)) for i in range(8)]
        await c.run(*spread)
        assert [len(replica.engine.requests) for replica in c.replicas] == [4, 4]
        prompt = tuple(range(320))
        for i in range(4):
            await c.run(c.generate(request(f"p{i}", prompt=(*prompt, i))))
        counts = [len(replica.engine.requests) for replica in c.replicas]
        assert sorted(counts) == [4, 8]


@in_loop
async def test_two_requests_of_one_id_do_not_meet() -> None:
    async with cluster() as c:
        one, two = request("same", seed=1), request("same", seed=2)
        first, second = await c.run(c.generate(one), c.generate(two))
        assert (tokens(first), tokens(second)) == (fake_output(one), fake_output(two))


@in_loop
async def test_a_full_queue_refuses_and_a_queued_request_runs_later() -> None:
    options = RouterOptions(max_queued_requests=2, max_waiting_per_replica=0)
    async with cluster(options=options, max_num_seqs=1) as c:
        running = c.generate(request("running"))
        await eventually(lambda: c.running() == [1])
        queued = [c.generate(request("late", priority=1)), c.generate(request("early", priority=-1))]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 requests with 6 tokens are queued") as caught:
            await collect(c.router, request("refused"))
        assert caught.value.retry_after >= 1.0
        await c.run(running, *queued)
        assert [r.request_id for r in c.replicas[0].engine.requests] == ["running", "early", "late"]


@in_loop
async def test_without_a_replica_a_request_waits_and_then_gives_up() -> None:
    async with cluster(options=RouterOptions(queue_timeout=0.05)) as c:
        await c.replicas[0].close()
        await eventually(lambda: c.router.replicas("fake") == [])
        with pytest.raises(NoReplica, match=r"within 0\.05 s \(0 of 1 are reachable\)"):
            await collect(c.router, request())


@in_loop
async def test_a_replica_that_joins_gets_the_requests_that_wait() -> None:
    async with cluster() as c:
        await c.replicas[0].close()
        await eventually(lambda: c.router.replicas("fake") == [])
        waiting = c.generate(request())
        await c.add()
        (deltas,) = await c.run(waiting)
        assert tokens(deltas) == fake_output(request())


@in_loop
async def test_the_first_request_goes_at_once_and_those_of_a_window_go_together() -> None:
    async with cluster(options=RouterOptions(batching_window=0.2)) as c:
        engine = c.replicas[0].engine
        tasks = [c.generate(request("first"))]
        await eventually(lambda: len(engine.requests) == 1)
        for i in range(8):
            tasks.append(c.generate(request(f"r{i}")))
            await asyncio.sleep(0)
        await eventually(lambda: len(engine.requests) > 1)
        assert len(engine.requests) == 9
        await c.run(*tasks)


@in_loop
async def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with cluster(2) as c:
        before = [c.generate(request(f"b{i}")) for i in range(4)]
        await eventually(lambda: sum(c.running()) == 4)
        assert await c.router.drain("fake", "fake-0")
        after = [c.generate(request(f"a{i}")) for i in range(4)]
        await eventually(lambda: c.running() == [2, 6])
        results = await c.run(*before, *after)
        assert all(tokens(deltas) == fake_output(request()) for deltas in results)
        async with asyncio.timeout(5):
            await c.replicas[0].server.drained()
        assert not await c.router.drain("fake", "unknown")


@in_loop
async def test_a_model_that_stops_finishes_what_its_replicas_can_and_ends_the_rest() -> None:
    async with cluster(2) as c:
        finished, cut = c.generate(request("finished")), c.generate(request("cut"))
        await eventually(lambda: c.running() == [1, 1])
        c.step()
        other = replace(c.replicas[0].info, replica_id="other-0", model_id="other")  # by which the news is seen
        c.source.set([*(replica.info for replica in c.replicas), other], stopping=frozenset({"fake"}))
        late = request("late")
        await eventually(lambda: "other" in c.router.models())
        with pytest.raises(NoReplica, match="stopping"):
            await collect(c.router, late)
        await c.replicas[1].close()
        [deltas] = await c.run(cut)
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert "stopping" in (deltas[-1].error or "")
        [deltas] = await c.run(finished)
        assert tokens(deltas) == fake_output(request())
        c.source.set([c.replicas[0].info])
        [deltas] = await c.run(c.generate(late))
        assert tokens(deltas) == fake_output(late)


@in_loop
async def test_requests_sent_to_a_replica_that_has_just_drained_go_elsewhere() -> None:
    async with cluster(2) as c:
        # Both events are in one turn of the loop: the router places before it can hear of the drain.
        tasks = [c.generate(request(f"r{i}")) for i in range(6)]
        await asyncio.sleep(0)
        c.replicas[0].server.start_drain()
        results = await c.run(*tasks)
        assert all(tokens(deltas) == fake_output(request()) for deltas in results)
        assert c.replicas[0].engine.requests == []


@in_loop
async def test_block_reports_and_prefix_cache_reset() -> None:
    async with cluster(2) as c:
        tasks = [c.generate(request(f"r{i}")) for i in range(2)]
        await eventually(lambda: c.running() == [1, 1])
        reports = await c.router.block_reports("fake")
        assert [report["replica_id"] for report in reports] == ["fake-0", "fake-1"]
        requests = {name: counts for report in reports for name, counts in report["requests"].items()}
        assert requests == {f"r{i}": {"shared": 2, "private": 1, "copied": 0} for i in range(2)}
        assert not await c.router.reset_prefix_cache("fake")
        await c.run(*tasks)
        assert await c.router.reset_prefix_cache("fake")


@in_loop
async def test_an_answer_that_cannot_be_read_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster(2) as c:
        monkeypatch.setattr(c.replicas[0].engine, "block_reports", lambda: "of another version")
        async with asyncio.timeout(20):
            reports = await c.router.block_reports("fake")
        assert [report["replica_id"] for report in reports] == ["fake-1"]


@in_loop
async def test_times_and_metrics() -> None:
    async with cluster() as c:
        times = RequestTimes()
        stream = c.router.generate("fake", request(max_tokens=2), times=times)

        async def read() -> list[object]:
            return [deltas async for deltas in stream]

        await c.run(asyncio.ensure_future(read()))  # pyright: ignore[reportArgumentType]
        assert times.dispatched is not None
        assert times.first_token is not None
        assert times.finished is not None
        assert times.arrived <= times.dispatched <= times.first_token <= times.finished
        samples = {
            sample.name: sample.value
            for family in c.router.collector.collect()
            for sample in family.samples
            if sample.labels.get("le") in (None, "+Inf")
        }
        assert samples["vllm:request_queue_time_seconds_count"] == 1
        assert samples["shoal_request_prefill_time_seconds_count"] == 1
        assert samples["shoal_router_pick_seconds_count"] == 1
        assert samples["shoal_router_replicas"] == 1
        assert samples["shoal_tokens_recomputed_total"] == 0


@in_loop
async def test_replicas_that_leave_without_a_drain_are_counted() -> None:
    def lost() -> list[float]:
        families = {family.name: family for family in c.router.collector.collect()}
        return [sample.value for sample in families["shoal_router_replicas_lost"].samples]

    async with cluster(3) as c:
        await c.router.drain("fake", "fake-0")
        await c.replicas[0].close()
        await eventually(lambda: len(c.router.replicas("fake")) == 2)
        assert lost() == [0]
        await c.replicas[1].close()
        await eventually(lambda: len(c.router.replicas("fake")) == 1)
        assert lost() == [1]


@in_loop
async def test_a_reader_that_does_not_read_is_cut_and_told_so() -> None:
    async with cluster(options=RouterOptions(max_pending_deltas=10)) as c:
        async with aclosing(c.router.generate("fake", request("slow", max_tokens=1000))) as stream:
            first = asyncio.ensure_future(anext(stream))
            await eventually(lambda: c.running() == [1])
            c.step()
            await first
            while not c.replicas[0].engine.aborted:
                c.step()
                await asyncio.sleep(0)
            rest = [delta async for deltas in stream for delta in deltas]
        assert len(rest) <= 12
        assert rest[-1].finish_reason is FinishReason.ERROR
        assert "were not read" in (rest[-1].error or "")


@in_loop
async def test_load_reports_reach_the_router() -> None:
    async with cluster() as c:
        task = c.generate(request(max_tokens=3))
        await eventually(lambda: c.router.replicas("fake")[0][1].num_running == 1)
        await c.run(task)
        await eventually(lambda: c.router.replicas("fake")[0][1].num_running == 0)
        assert c.router.replicas("fake")[0][0] == c.replicas[0].info
        assert c.router.models() == ["fake"]


@in_loop
async def test_a_replica_that_is_not_listed_keeps_its_connection_while_that_stands() -> None:
    async with cluster() as c:
        task = c.generate(request(max_tokens=4))
        await eventually(lambda: c.running() == [1])
        c.source.set([])  # as a directory that has just restarted
        (deltas,) = await c.run(task)
        assert tokens(deltas) == fake_output(request(max_tokens=4))
        assert len(c.router.replicas("fake")) == 1
        await c.replicas[0].close()
        await eventually(lambda: c.router.replicas("fake") == [])
        assert c.router.models() == ["fake"]
