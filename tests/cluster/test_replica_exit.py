"""A replica whose engine has failed exits, whatever else goes wrong."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shoal.cluster.replica import Replica
from shoal.replicas.errors import EngineError
from tests.support.cluster import in_loop


class Failing:
    """Stands for the server or the shard group of a replica; what is asked of it may raise."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.asked = 0

    def _ask(self, *_: object) -> None:
        self.asked += 1
        if self._error is not None:
            raise self._error

    fail = kill = _ask
    info = None


class EndingReplica(Replica):
    """Has failed parts and no engine, and notes its exit."""

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
