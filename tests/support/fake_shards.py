"""Shard actors without processes and models: a thread each, and both ends of a real step channel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from shoal.cluster.shards.placement import ActorPlacement
from shoal.replicas.channel.step_channel import StepChannelClient
from shoal.replicas.channel.step_sockets import Address
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, ResolvedConfig
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.executors.group_start import Loaded
from tests.support.engines import facts
from tests.support.step_group import answer

NUM_BLOCKS = 64
METHODS = ("placement", "assign", "open_store", "join", "load", "serve")


class FakeShard:
    """A ShardHandle. `before` is called with a method's name ahead of the method, in the shard's own thread."""

    def __init__(self, placement: ActorPlacement, before: Callable[[str], None] = lambda _: None) -> None:
        self._placement = placement
        self._before = before
        self.rank: int | None = None
        self.assignment: tuple[int, tuple[str, ...]] | None = None
        self.assigned_rank: tuple[int, int, ActorPlacement] | None = None
        self.stopped = False
        self.killed = threading.Event()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._pending: list[Future[Any]] = []
        self._client: StepChannelClient | None = None

    def call(self, method: str, *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((method, args))
        self._pending.append(future)

        def run() -> None:
            try:
                self._before(method)
                result = getattr(self, f"_{method}_now")(*args)
            except Exception as error:
                outcome = future.set_exception, error
            else:
                outcome = future.set_result, result
            if not self.killed.is_set():
                outcome[0](outcome[1])

        threading.Thread(target=run, daemon=True).start()
        return future

    def __str__(self) -> str:
        return "an actor" if self.assigned_rank is None else "rank {} of {} ({})".format(*self.assigned_rank)

    def assigned(self, rank: int, world_size: int, placement: ActorPlacement) -> None:
        self.assigned_rank = rank, world_size, placement

    def is_stopped(self) -> bool:
        return self.stopped

    def kill(self) -> None:
        if self.killed.is_set():
            return
        self.killed.set()
        for future in self._pending:
            if not future.done():
                future.set_exception(ShardGroupError("its process has ended"))
        if self._client is not None:
            self._client.close()

    def _placement_now(self) -> ActorPlacement:
        return self._placement

    def _assign_now(self, config: ResolvedConfig, rank: int, local_rank: int, visible: tuple[str, ...]) -> None:
        self.rank, self.assignment = rank, (local_rank, visible)
        self._world_size = config.parallel.world_size
        self._answers = rank == self._world_size - config.parallel.tensor_parallel_size

    def _open_store_now(self, host: str) -> tuple[str, int]:
        return host, 1

    def _join_now(self, store: tuple[str, int], timeout_s: float) -> None: ...

    def _load_now(self) -> Loaded:
        return Loaded(NUM_BLOCKS, {"weights": float(self.rank or 0)})

    def _serve_now(self, address: Address, token: bytes) -> None:
        assert self.rank is not None
        self._client = client = StepChannelClient(address, self.rank, self._world_size, token)
        if self.killed.is_set():  # after the engine had accepted it, and before the line above
            client.close()
        while (plan := client.receive()) is not None:
            if self._answers:
                client.send_result(answer(plan))
        client.close()


def group_config(tp: int, pp: int = 1, device: str = "cpu") -> ResolvedConfig:
    """A resolved configuration of so many ranks."""
    model = replace(facts(), num_layers=pp, num_attention_heads=tp, num_kv_heads=tp)
    config = EngineConfig(ModelConfig("fake"), CacheConfig(16, NUM_BLOCKS), parallel=ParallelConfig(tp, pp))
    return config.resolve(model, device)
