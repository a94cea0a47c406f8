"""How ranks meet: those that fit do, and the error of those that do not says who is missing or differs."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from shoal.replicas.config import ResolvedConfig
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.executors.shard_rank import ShardRank
from shoal.replicas.models import loader
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.worker import shard
from tests.support.checkpoints import FAMILIES
from tests.support.golden import engine_config, meeting_config


@pytest.fixture
def config() -> ResolvedConfig:
    return meeting_config()


def meet(*configs: ResolvedConfig) -> list[BaseException | None]:
    """What each rank's joining raises; every rank has a configuration of its own."""
    ranks = [ShardRank(config, rank, rank) for rank, config in enumerate(configs)]
    store = ranks[0].open_store("127.0.0.1")
    with ThreadPoolExecutor(len(ranks)) as pool:
        futures = [pool.submit(rank.join, store, 30.0) for rank in ranks]
    for rank in ranks:
        rank.abort()
    return [future.exception() for future in futures]


def test_ranks_that_fit_meet(config):
    assert meet(config, config) == [None, None]


def test_every_rank_is_told_that_configurations_differ(config):
    other = replace(config, batch_invariant=True)
    for error in meet(config, other):
        assert isinstance(error, ShardGroupError)
        assert "the ranks differ in the configuration: rank 0 has" in error.message


def test_every_rank_is_told_that_files_of_weights_differ(config, tmp_path):
    """One path, which leads elsewhere when rank 0 comes to it, as on another node."""
    llama, mixtral = (FAMILIES[family](tmp_path / family) for family in ("llama", "mixtral"))
    path = tmp_path / "model"
    path.symlink_to(llama)
    config = replace(config, model=replace(config.model, path=str(path), load_format="safetensors"))
    ranks = [ShardRank(config, rank, rank) for rank in range(2)]
    store = ranks[0].open_store("127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(ranks[1].join, store, 30.0)]
        assert ranks[0]._store is not None
        ranks[0]._store.wait(["facts of 1"], timedelta(seconds=30))
        path.unlink()
        path.symlink_to(mixtral)
        joining.append(pool.submit(ranks[0].join, store, 30.0))
    for future in joining:
        with pytest.raises(ShardGroupError) as caught:
            future.result()
        assert f"differ in 1 of 1 files of weights, the first being {path / 'model.safetensors'}" in str(caught.value)


def test_a_rank_that_does_not_come_is_named(config):
    rank = ShardRank(config, 0, 0)
    with pytest.raises(ShardGroupError, match=r"rank 0 has waited 0\.\d s for the facts of ranks \[1\] of 2"):
        rank.join(rank.open_store("127.0.0.1"), 0.2)


def test_a_store_that_is_lost_is_not_said_to_have_been_waited_for(config):
    ranks = [ShardRank(config, rank, rank) for rank in range(2)]
    store = ranks[0].open_store("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ranks[1].join, store, 300.0)
        assert ranks[0]._store is not None
        ranks[0]._store.wait(["facts of 1"], timedelta(seconds=30))
        ranks[0]._store = None  # it ends with its last holder
        with pytest.raises(ShardGroupError, match=r"rank 1 has waited \d\.\d s for the facts of ranks \(unknown"):
            waiting.result(30)


def test_ranks_wait_for_each_other_between_weights_and_collectives(tmp_path, monkeypatch):
    """By the store, where the limit is that of the group's start: collectives give up after minutes."""
    folder, events = FAMILIES["llama"](tmp_path), []

    def load_model(*arguments):
        events.append("weights")
        return loader.load_model(*arguments)

    def agree(number: int) -> int:
        events.append(number)
        return min(number, 7)

    monkeypatch.setattr(shard, "load_model", load_model)
    made = shard.Shard(engine_config(folder).resolve(read_model_facts(folder), "cpu"), agree=agree)
    assert events == ["weights", 0, events[-1]]
    assert events[-1] > made.num_blocks == 7


def test_a_store_that_is_not_there_is_named(config):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ShardGroupError, match=rf"rank 1 cannot reach the group's store at \('127.0.0.1', {port}\)"):
        ShardRank(config, 1, 1).join(("127.0.0.1", port), 5.0)


def test_the_store_listens_on_the_given_address_alone(config):
    rank = ShardRank(config, 0, 0)
    host, port = rank.open_store("127.0.0.1")
    socket.create_connection((host, port), 5.0).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 5.0)
