"""Ranks of a shard group on nodes that are network namespaces: real processes, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.cluster.shards.placement import ActorPlacement
from shoal.cluster.shards.shard_group import DriverNode, ShardGroup, start_shard_group
from shoal.replicas.config import EngineConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.executors.shard_processes import RankProcess
from shoal.replicas.models.checkpoint import read_model_facts
from tests.support.netns import Namespace


class NodeShard:
    """A ShardHandle whose actor is a process in a namespace."""

    def __init__(self, node: Namespace) -> None:
        self._node = node
        self._process: RankProcess | None = None

    def call(self, method: str, *args: Any) -> Future[Any]:
        if method == "placement":
            return _done(ActorPlacement(self._node.address, self._node.address, 0, ()))
        if method == "assign":
            config, rank, local_rank, _ = args
            with self._node.entered():
                self._process = RankProcess(config, rank, local_rank)
            return _done(None)
        assert self._process is not None
        return self._process.call(method, *args)

    def __str__(self) -> str:
        return f"{self._process} on {self._node.address}"

    def assigned(self, rank: int, world_size: int, placement: ActorPlacement) -> None:
        pass

    def is_stopped(self) -> bool:
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def has_left(self, seconds: float) -> bool:
        """Whether the process has ended by itself, within that time."""
        assert self._process is not None
        return self._process.wait(seconds)


class Group:
    """An engine on the node `driver_at`, and its ranks one by one on `nodes`."""

    def __init__(self, config: EngineConfig, driver_at: Namespace, nodes: Sequence[Namespace]) -> None:
        facts = read_model_facts(Path(config.model.path))
        resolved = config.resolve(facts, "cpu")
        self.shards = [NodeShard(node) for node in nodes]
        launch = self.shards.__getitem__
        with driver_at.entered():
            node = DriverNode(driver_at.address, driver_at.address)
            self.group: ShardGroup = start_shard_group(resolved, launch, node, timeout_s=120)
        self.engine = Engine(resolved, facts, self.group)


@contextmanager
def group_on(config: EngineConfig, driver_at: Namespace, nodes: Sequence[Namespace]) -> Iterator[Group]:
    made = Group(config, driver_at, nodes)
    try:
        yield made
    finally:
        made.group.shutdown()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
