"""A replica exits after an engine failure, despite other errors; a stop by Serve has a time limit."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from shoal.cluster.replica import replica as replica_module
from shoal.cluster.replica.replica import Replica, ReplicaOptions
from shoal.replicas.engine.engine_thread import EngineThread
from shoal.replicas.errors import EngineError
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.cluster import eventually, in_loop
from tests.support.engines import make_engine


class Failing:
    """A fake server or shard group whose methods may raise."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.asked = 0

    def _call(self, *_: object) -> None:
        self.asked += 1
        if self._error is not None:
            raise self._error

    fail = kill = _call
    info = None


class EndingReplica(Replica):
    """Has failing parts and no engine, and records its exit."""

    def __init__(self, server: Failing, shards: Failing) -> None:
        self._failure = None
        self._server: Any = server
        self._shards: Any = shards
        self._directory: Any = self
        self.exited = asyncio.Event()

    async def deregister(self, _: object) -> None:
        return None

    def exit_process(self) -> None:
        self.exited.set()


@pytest.mark.parametrize("server_error", [None, OSError("the server")], ids=["", "server"])
@pytest.mark.parametrize("shards_error", [None, RuntimeError("the shards")], ids=["", "shards"])
@in_loop
async def test_a_failed_replica_exits_whatever_raises_on_the_way(
    server_error: Exception | None, shards_error: Exception | None
) -> None:
    server, shards = Failing(server_error), Failing(shards_error)
    replica = EndingReplica(server, shards)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    loop.call_soon(replica._fail, EngineError("a rank is gone"))
    await replica.exited.wait()
    replica._fail(EngineError("and another"))
    assert (server.asked, shards.asked) == (1, 1)


class IdleServer:
    """A server that no router is connected to."""

    info = None

    def start_drain(self) -> None: ...

    async def drained(self) -> None: ...

    async def close(self) -> None: ...


class StoppedReplica(Replica):
    """Has an engine and no routers."""

    def __init__(self, engine: Any, thread: EngineThread) -> None:
        self._closed, self._tasks = False, []
        self._options = ReplicaOptions()
        self._server: Any = IdleServer()
        self._directory: Any = self
        self._engine, self._thread = engine, thread

    async def deregister(self, _: object) -> None:
        return None


@in_loop
async def test_a_replica_that_is_stopped_ends_the_ranks_of_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "_STOP_TIMEOUT", 0.05)
    engine, executor = make_engine()
    executor.gate = threading.Event()
    thread = EngineThread(engine, lambda _: None, lambda _: None)
    thread.start()
    thread.submit(Request("1", (1, 2, 3), SamplingParams(max_tokens=8)))
    await eventually(lambda: executor.plans)
    try:
        async with asyncio.timeout(20):
            await StoppedReplica(engine, thread).close()
        assert executor.closed
    finally:
        executor.gate.set()
        thread.stop()
