"""How ranks become a group: whatever one of them does, the error says whose fault it was."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from shoal.replicas.channel.step_channel import StepChannelClient, StepChannelServer
from shoal.replicas.config import ResolvedConfig
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.executors import group_start
from shoal.replicas.executors.group_start import GroupStart
from shoal.replicas.executors.shard_rank import ShardRank
from tests.support.golden import meeting_config
from tests.support.step_group import run_in_thread


@pytest.fixture
def config() -> ResolvedConfig:
    return meeting_config()


class ConnectedRank:
    """Has nothing to load, and is connected until its run is ended."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.run: Future[Any] = Future()
        self.client: Future[StepChannelClient] = Future()

    def __str__(self) -> str:
        return f"rank {self.rank}"

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        assert method == "serve"
        address, token = arguments
        self.client = run_in_thread(StepChannelClient, address, self.rank, 2, token)
        return self.run

    def is_stopped(self) -> bool:
        return False


class RankInThread:
    """A real rank; if it is stuck, no call of it is answered."""

    def __init__(self, config: ResolvedConfig, rank: int, *, stuck: bool) -> None:
        self.rank = ShardRank(config, rank, rank)
        self._name, self._stuck = f"rank {rank}", stuck

    def __str__(self) -> str:
        return self._name

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        return Future() if self._stuck else run_in_thread(getattr(self.rank, method), *arguments)

    def is_stopped(self) -> bool:
        return False


def test_a_rank_that_ends_as_all_have_been_accepted_is_named(config: ResolvedConfig, monkeypatch) -> None:
    ranks = [ConnectedRank(0), ConnectedRank(1)]
    accept = StepChannelServer.accept

    def accept_and_lose(server: StepChannelServer, timeout_s: float) -> None:
        accept(server, timeout_s)
        ranks[1].run.set_exception(ShardGroupError("it was killed by signal 9"))

    monkeypatch.setattr(StepChannelServer, "accept", accept_and_lose)
    with pytest.raises(ShardGroupError, match="the ranks could not connect: rank 1: it was killed by signal 9"):
        GroupStart(config, 30.0).connect(ranks, [False, False], "127.0.0.1")
    for rank in ranks:
        rank.client.result(30).close()


def test_a_rank_for_which_the_others_wait_is_named_alone(config: ResolvedConfig, monkeypatch) -> None:
    monkeypatch.setattr(group_start, "_ROOT_CAUSE_SECONDS", 0.2)
    ranks = [RankInThread(config, 0, stuck=False), RankInThread(config, 1, stuck=True)]
    with pytest.raises(ShardGroupError, match=r"rank 0 has waited .* s for the facts of ranks \[1\] of 2"):
        GroupStart(config, 1.0).load(ranks, "127.0.0.1")
