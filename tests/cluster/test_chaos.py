"""Engine, thread, server and router under broken connections and leaving readers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from shoal.cluster.replica.replica_server import ReplicaServer
from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.router import Router
from shoal.cluster.wire.membership import ReplicaInfo, StaticMembership
from shoal.replicas.channel.handshake import new_secret
from shoal.replicas.engine.engine_thread import EngineThread
from shoal.replicas.protocol import Request, SamplingParams, TokenDelta
from tests.support.cluster import in_loop
from tests.support.engines import Transcript, make_engine, naive

NUM_BLOCKS = 64


class EngineReplica:
    """A replica's server and engine over fake shards. fail_step: its last step."""

    def __init__(self, secret: bytes, index: int, fail_step: int | None = None) -> None:
        self.engine, executor = make_engine(num_blocks=NUM_BLOCKS)
        executor.fail_step = fail_step
        info = ReplicaInfo(f"replica-{index}", "fake", "127.0.0.1", 0, epoch=index, block_size=4, max_num_seqs=8)
        self.server = ReplicaServer(info, secret)
        self.failures: list[BaseException] = []
        self.thread = EngineThread(self.engine, self._on_deltas, self._on_failure)
        self._loop = asyncio.get_running_loop()

    def _on_deltas(self, deltas: list[TokenDelta]) -> None:
        if self.engine.failure is None:
            self.server.publish(deltas)

    def _on_failure(self, error: BaseException) -> None:
        self.failures.append(error)
        self._loop.call_soon_threadsafe(self.server.fail, error)

    async def __aenter__(self) -> EngineReplica:
        await self.server.start(self.thread)
        self.thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.close()
        await asyncio.to_thread(self.thread.stop)

    def cut(self) -> None:
        """Cut all routers' connections; this replica survives."""
        self.server.cut_all()

    async def idle(self) -> bool:
        """Whether no state of any request is left."""
        load = await asyncio.wrap_future(self.thread.call(lambda engine: engine.load()))
        return self.server.num_streams == 0 and load.num_free_blocks == NUM_BLOCKS and not self.engine.has_work


@asynccontextmanager
async def replicas_and_router(
    num_replicas: int, fail_step: int | None = None
) -> AsyncIterator[tuple[list[EngineReplica], Router]]:
    """The first replica's engine fails in `fail_step`."""
    secret = new_secret()
    async with AsyncExitStack() as stack:
        made = [EngineReplica(secret, i, None if i else fail_step) for i in range(num_replicas)]
        replicas = [await stack.enter_async_context(replica) for replica in made]
        options = RouterOptions(replay_limit=1000, reconnect_delay=0.001, max_reconnect_delay=0.002)
        router = Router(StaticMembership([replica.server.info for replica in replicas]), secret, options)
        await router.start()
        stack.push_async_callback(router.close)
        yield replicas, router


def make_request(draw: random.Random, index: int) -> Request:
    prompt = tuple(draw.randrange(4, 40) for _ in range(draw.randrange(1, 30)))
    sampling = SamplingParams(
        max_tokens=draw.randrange(1, 40),
        seed=index,
        ignore_eos=draw.random() < 0.8,
        min_tokens=draw.choice((0, 0, 1)),
        stop_token_ids=draw.choice(((), (7, 8))),
    )
    return Request(str(index), prompt, sampling, num_samples=draw.randrange(1, 4), priority=draw.randrange(2))


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@in_loop
async def test_every_reader_gets_its_tokens_once_and_nothing_is_left(seed: int, num_replicas: int) -> None:
    draw = random.Random(seed)
    requests = [make_request(draw, i) for i in range(24)]
    leavers = {request.request_id: draw.randrange(1, 8) for request in requests[::5]}
    transcript = Transcript()
    num_arrivals = 0
    async with replicas_and_router(num_replicas) as (replicas, router):

        async def read(request: Request) -> None:
            nonlocal num_arrivals
            patience = leavers.get(request.request_id)
            async with aclosing(router.generate("fake", request)) as stream:
                async for deltas in stream:
                    transcript.add(deltas)
                    num_arrivals += 1
                    if num_arrivals % 29 == 0:
                        draw.choice(replicas).cut()
                    if patience is not None and (patience := patience - 1) == 0:
                        return

        await asyncio.gather(*(read(request) for request in requests))
        for request in requests:
            if request.request_id not in leavers:
                assert transcript.outcome(request) == naive(request)
        for replica in replicas:
            while not await replica.idle():
                await asyncio.sleep(0)
            assert replica.failures == []
    assert num_arrivals > 29


@pytest.mark.parametrize("fail_step", [0, 1, 5, 20])
@in_loop
async def test_a_failed_engine_is_not_noticed_by_readers(fail_step: int) -> None:
    draw = random.Random(fail_step)
    requests = [make_request(draw, i) for i in range(24)]
    transcript = Transcript()
    async with replicas_and_router(2, fail_step) as (replicas, router):

        async def read(request: Request) -> None:
            async for deltas in router.generate("fake", request):
                transcript.add(deltas)

        await asyncio.gather(*(read(request) for request in requests))
        assert [transcript.outcome(request) for request in requests] == [naive(request) for request in requests]
        assert [str(failure) for failure in replicas[0].failures] == ["the fake step failed"]
        assert replicas[0].server.num_streams == 0
        assert replicas[1].failures == []
