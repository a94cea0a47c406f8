"""Both ends of a step channel in one process, each rank in a thread of its own."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal.replicas.channel.step_channel import StepChannelClient, StepChannelServer
from shoal.replicas.plan import StepPlan, StepResult

TOKEN = secrets.token_bytes(32)
HOSTS = pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["unix", "tcp"])


def run_in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *args)
    pool.shutdown(wait=False)
    return future


def wait_until_asleep(thread_id: int) -> None:
    """Until the thread waits in the kernel."""
    stat = Path(f"/proc/self/task/{thread_id}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)


def blocked(function: Callable[[], Any]) -> Future[Any]:
    """The call in a thread of its own, once it waits."""
    ids: Future[int] = Future()

    def call() -> Any:
        ids.set_result(threading.get_native_id())
        return function()

    future = run_in_thread(call)
    wait_until_asleep(ids.result(30))
    return future


class Group:
    """A server and its ranks, in one process."""

    def __init__(self, world_size: int = 2, host: str | None = None, result_rank: int = 0) -> None:
        self.server = StepChannelServer(world_size, TOKEN, result_rank=result_rank, host=host)
        address = self.server.address or self.server.path
        coming = [run_in_thread(StepChannelClient, address, rank, world_size, TOKEN) for rank in range(world_size)]
        self.server.accept(30)
        self.clients: list[StepChannelClient] = [future.result(30) for future in coming]

    def close(self) -> None:
        self.server.close()
        for client in self.clients:
            client.close()


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, plan.sample_rows + plan.step)
