"""A router over fake replicas, and waiting for what happens in other tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from functools import wraps
from typing import Any

from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.router import Router
from shoal.cluster.wire.membership import StaticMembership
from shoal.replicas.channel.handshake import new_secret
from shoal.replicas.protocol import Request, SamplingParams, TokenDelta
from tests.support.fake_replica import FakeReplica

PATIENCE = 20.0  # seconds; only a failing test waits so long


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a coroutine test in an event loop of its own."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 2 * PATIENCE))

    return run


async def eventually(condition: Callable[[], object]) -> None:
    """Returns once `condition()` is true; looks at it in every turn of the loop."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


def request(name: str = "r", *, prompt: tuple[int, ...] = (1, 2, 3), samples: int = 1, **sampling: Any) -> Request:
    sampling = {"max_tokens": 8, "seed": 5, **sampling}
    priority = sampling.pop("priority", 0)
    return Request(name, prompt, SamplingParams(**sampling), num_samples=samples, priority=priority)


class Cluster:
    """Fake replicas `fake-0`, `fake-1`, ... of one model, and a router."""

    def __init__(self, secret: bytes, replicas: list[FakeReplica], source: StaticMembership, router: Router) -> None:
        self.secret = secret
        self.replicas = replicas
        self.source = source
        self.router = router

    async def add(self, **options: Any) -> FakeReplica:
        """One more replica, known to the router at once."""
        replica = FakeReplica(self.secret, replica_id=f"fake-{len(self.replicas)}", **options)
        await replica.start()
        self.replicas.append(replica)
        self.source.set([replica.info for replica in self.replicas])
        return replica

    def generate(self, request: Request) -> asyncio.Task[list[TokenDelta]]:
        """All deltas of the request, once it has ended."""
        return asyncio.create_task(collect(self.router, request))

    def step(self) -> None:
        for replica in self.replicas:
            replica.engine.step()

    async def run(self, *tasks: Awaitable[list[TokenDelta]]) -> list[list[TokenDelta]]:
        """Steps the engines until the tasks are done."""
        done = asyncio.gather(*tasks)
        async with asyncio.timeout(PATIENCE):
            while not done.done():
                self.step()
                await asyncio.sleep(0)
        return await done

    def running(self) -> list[int]:
        return [replica.engine.load().num_running for replica in self.replicas]


async def collect(router: Router, request: Request) -> list[TokenDelta]:
    return [delta async for deltas in router.generate("fake", request) for delta in deltas]


def tokens(deltas: list[TokenDelta], sample: int = 0) -> tuple[int, ...]:
    return tuple(token for delta in deltas if delta.sample == sample for token in delta.token_ids)


@asynccontextmanager
async def cluster(
    num_replicas: int = 1, *, options: RouterOptions | None = None, **replica_options: Any
) -> AsyncIterator[Cluster]:
    secret = new_secret()
    async with AsyncExitStack() as stack:
        replicas: list[FakeReplica] = []
        for i in range(num_replicas):
            replica = FakeReplica(secret, replica_id=f"fake-{i}", **replica_options)
            replicas.append(await stack.enter_async_context(replica))
        source = StaticMembership([replica.info for replica in replicas])
        router = Router(source, secret, options)
        await router.start()
        made = Cluster(secret, replicas, source, router)
        try:
            yield made
        finally:
            await router.close()
            for replica in made.replicas[num_replicas:]:
                await replica.close()
