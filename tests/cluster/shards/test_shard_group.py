"""Start and shutdown of shard groups. The actors are fake and the step channel is real; real actors are
in `test_sharded_replicas.py`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from shoal.cluster.shards.placement import ActorPlacement
from shoal.cluster.shards.shard_group import DriverNode, ShardGroup, start_shard_group
from shoal.replicas.channel.step_channel import StepChannelServer
from shoal.replicas.config import ResolvedConfig
from shoal.replicas.errors import ConfigError, EngineError, ModelError, ServingError, ShardGroupError
from shoal.replicas.executors import group_start
from shoal.replicas.executors.group_executor import GroupExecutor
from shoal.replicas.executors.group_start import Loaded
from tests.support.fake_shards import METHODS, NUM_BLOCKS, FakeShard, group_config
from tests.support.step_group import answer, blocked
from tests.support.steps import decode_plan, same

HOME = DriverNode("node-0", "127.0.0.1")
PATIENCE = 20.0  # seconds; only a failing test waits so long


def placement(node: int = 0, gpu: int | None = None, pid: int = 100) -> ActorPlacement:
    return ActorPlacement(f"node-{node}", f"10.0.0.{node}", pid, () if gpu is None else (str(gpu),))


class Maker:
    """Starts groups of fake shards. faults: by (launched actor, method), a function called before the method."""

    def __init__(self, servers: list[StepChannelServer]) -> None:
        self.servers = servers
        self.shards: list[FakeShard] = []
        self.faults: dict[tuple[int, str], Callable[[], object]] = {}
        self.groups: list[ShardGroup] = []

    def start(
        self, config: ResolvedConfig, placements: list[ActorPlacement], timeout_s: float = PATIENCE
    ) -> ShardGroup:
        def launch(index: int) -> FakeShard:
            def before(method: str) -> None:
                if (fault := self.faults.get((index, method))) is not None:
                    fault()

            self.shards.append(FakeShard(placements[index], before))
            return self.shards[-1]

        self.groups.append(start_shard_group(config, launch, HOME, timeout_s=timeout_s))
        return self.groups[-1]

    def fault(self, actor: int, method: str, what: Callable[[], object] | Exception) -> None:
        def raise_it() -> None:
            assert isinstance(what, Exception)
            raise what

        self.faults[actor, method] = raise_it if isinstance(what, Exception) else what

    @property
    def open_channels(self) -> set[str]:
        """Channels with an open socket of the engine, listening or connected."""
        names = {line.split()[-1] for line in Path("/proc/net/unix").read_text().splitlines()}
        return names & {server.path for server in self.servers}

    @property
    def nothing_left(self) -> bool:
        """Whether every actor has ended and every channel is closed."""
        return all(shard.killed.is_set() for shard in self.shards) and not self.open_channels


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Maker]:
    servers: list[StepChannelServer] = []
    opened = StepChannelServer.__init__

    def remember(server: StepChannelServer, *args: object, **options: object) -> None:
        opened(server, *args, **options)  # pyright: ignore[reportArgumentType]
        servers.append(server)

    monkeypatch.setattr(StepChannelServer, "__init__", remember)
    made = Maker(servers)
    yield made
    for group in made.groups:
        group.shutdown()
    assert made.nothing_left


def test_a_group_runs_plans(maker: Maker) -> None:
    group = maker.start(group_config(2, 2), [placement()] * 4)
    assert (group.num_blocks, group.startup_seconds) == (NUM_BLOCKS, {"weights": 0.0})
    for step in range(3):
        group.submit(decode_plan(step))
    assert all(same(group.result(), answer(decode_plan(step))) for step in range(3))
    assert [method for method, _ in maker.shards[0].calls] == list(METHODS)
    assert all("open_store" not in dict(shard.calls) for shard in maker.shards[1:])
    group.shutdown()
    assert maker.nothing_left


def test_ranks_on_other_nodes_come_by_tcp_and_meet_at_rank_0s_address(maker: Maker) -> None:
    group = maker.start(group_config(1, 2), [placement(1), placement(0)])
    first, second = sorted(maker.shards, key=lambda shard: shard.rank or 0)
    [server] = maker.servers
    # The first stage is on the engine's node.
    assert [first.assigned_rank, second.assigned_rank] == [(0, 2, placement(0)), (1, 2, placement(1))]
    assert [dict(shard.calls)["serve"][0] for shard in (first, second)] == [server.path, server.address]
    assert dict(second.calls)["join"][0] == ("10.0.0.0", 1)
    group.submit(decode_plan(0))
    assert same(group.result(), answer(decode_plan(0)))


def test_on_one_node_nothing_listens_on_the_network(maker: Maker) -> None:
    maker.start(group_config(2), [placement()] * 2)
    assert maker.servers[0].address is None
    assert maker.open_channels == {maker.servers[0].path}
    assert dict(maker.shards[1].calls)["join"][0] == ("127.0.0.1", 1)


@pytest.mark.parametrize("actor", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_fails_on_one_rank_ends_all(maker: Maker, method: str, actor: int) -> None:
    if method == "open_store" and actor:
        return  # rank 0 alone opens it
    maker.fault(actor, method, ShardGroupError("NCCL 2.27.3 here, 2.26.1 on rank 0"))
    with pytest.raises(ShardGroupError, match=r"NCCL 2\.27\.3 here") as caught:
        maker.start(group_config(2), [placement(pid=100), placement(pid=101)])
    who = "an actor" if method == "placement" else rf"rank {actor} of 2 .*10\.0\.0\.0, process 10{actor}"
    assert caught.match(who)
    assert maker.nothing_left


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_dies_while_the_group_starts_ends_all(
    maker: Maker, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_start, "_ROOT_CAUSE_SECONDS", 0.1)  # which the hanging rank has none of
    hangs = threading.Event()
    maker.fault(0, method, lambda: maker.shards[0].kill())
    if method not in ("open_store", "placement"):
        maker.fault(1, method, lambda: hangs.wait(PATIENCE))  # as a rank whose peer is gone
    with pytest.raises(ShardGroupError, match="its process has ended"):
        maker.start(group_config(2), [placement()] * 2)
    assert maker.nothing_left
    hangs.set()


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_says_nothing_ends_all(maker: Maker, method: str) -> None:
    hangs = threading.Event()
    maker.fault(0, method, lambda: hangs.wait(PATIENCE))
    with pytest.raises(ShardGroupError, match=r"within 0\.[345]|no answer from") as caught:
        maker.start(group_config(2), [placement()] * 2, timeout_s=0.5)
    assert caught.match(r"an actor" if method == "placement" else r"rank 0 of 2|ranks \[0\] of 2")
    assert maker.nothing_left
    hangs.set()


@pytest.mark.parametrize("method", METHODS)
def test_a_rank_that_is_stopped_while_the_group_starts_ends_all(
    maker: Maker, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before the start's timeout."""
    monkeypatch.setattr(group_start, "_POLL_SECONDS", 0.02)
    goes_on = threading.Event()

    def stop() -> None:
        maker.shards[0].stopped = True
        goes_on.wait(PATIENCE)

    maker.fault(0, method, stop)
    with pytest.raises(ShardGroupError, match=r"stopped \(as by SIGSTOP\) for 0\.1 s: (an actor|rank 0 of 2)"):
        maker.start(group_config(2), [placement()] * 2, timeout_s=10 * PATIENCE)
    assert maker.nothing_left
    goes_on.set()


def test_a_rank_that_is_stopped_for_a_moment_is_waited_for(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([True, True, False] * 3)
    goes_on = threading.Event()

    def is_stopped(shard: FakeShard) -> bool:
        if shard is not maker.shards[0]:
            return False
        stopped = next(looks, None)
        if stopped is None:
            goes_on.set()
        return bool(stopped)

    monkeypatch.setattr(group_start, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(FakeShard, "is_stopped", is_stopped)
    maker.fault(0, "load", lambda: goes_on.wait(PATIENCE))
    maker.start(group_config(2), [placement()] * 2)
    assert goes_on.is_set()


@pytest.mark.parametrize("kind", [ModelError, ConfigError])
def test_what_is_wrong_with_the_model_keeps_its_class(maker: Maker, kind: type[ServingError]) -> None:
    """The consequence, the other rank's failure, may arrive first."""
    first = threading.Event()

    def reset() -> None:
        first.set()
        raise RuntimeError("Connection reset by peer\n  at gloo")

    def say() -> None:
        first.wait(PATIENCE)
        raise kind("model.safetensors is truncated")

    maker.fault(0, "load", reset)
    maker.fault(1, "load", say)
    with pytest.raises(kind, match=r"rank 1 .*is truncated; rank 0 .*RuntimeError: Connection reset by peer at gloo"):
        maker.start(group_config(2), [placement()] * 2)


def test_every_rank_has_one_gpu(maker: Maker) -> None:
    with pytest.raises(ShardGroupError, match=r"rank 0 of 2 .* 0 GPUs \(none\).*exactly one"):
        maker.start(group_config(2, device="cuda"), [placement(gpu=0), placement()])
    assert maker.nothing_left


def test_ranks_must_agree_on_their_blocks(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeShard, "_load_now", lambda shard: Loaded(NUM_BLOCKS + shard.rank, {}))
    with pytest.raises(ShardGroupError, match=r"KV blocks: \[64, 65\]"):
        maker.start(group_config(2), [placement()] * 2)


def test_an_actor_that_cannot_be_launched_ends_the_others(maker: Maker) -> None:
    with pytest.raises(IndexError):
        maker.start(group_config(2), [placement()])
    assert [shard.killed.is_set() for shard in maker.shards] == [True]


def test_a_failing_kill_spares_no_other_rank(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    group = maker.start(group_config(2), [placement()] * 2)
    kill = FakeShard.kill

    def kill_and_fail(shard: FakeShard) -> None:
        kill(shard)
        raise OSError("Ray is away")

    monkeypatch.setattr(FakeShard, "kill", kill_and_fail)
    group.kill()
    assert [shard.killed.is_set() for shard in maker.shards] == [True, True]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_in_a_step_fails_the_step(maker: Maker, rank: int) -> None:
    group = maker.start(group_config(2), [placement()] * 2)
    group.submit(decode_plan(0))
    assert same(group.result(), answer(decode_plan(0)))
    maker.shards[rank].kill()

    def go_on() -> None:
        for step in range(1, 100):
            group.submit(decode_plan(step))
            group.result()

    with pytest.raises(EngineError, match=f"rank {rank} of 2 is gone"):
        go_on()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_there_is_nothing_to_do_is_told(maker: Maker, rank: int) -> None:
    group = maker.start(group_config(2), [placement()] * 2)
    lost: Future[ServingError] = Future()
    group.watch(lost.set_result)
    maker.shards[rank].kill()
    assert f"lost rank {rank} of 2 (node 10.0.0.0, process 100): its process has ended" in str(lost.result(PATIENCE))


def test_stopped_ranks_are_named(maker: Maker) -> None:
    group = maker.start(group_config(2), [placement()] * 2)
    assert group.stopped() == []
    maker.shards[1].stopped = True
    assert group.stopped() == ["rank 1 of 2 (node 10.0.0.0, process 100)"]


@pytest.mark.parametrize("end", [ShardGroup.shutdown, ShardGroup.kill])
def test_a_group_that_is_taken_down_is_not_lost(maker: Maker, end: Callable[[ShardGroup], None]) -> None:
    group = maker.start(group_config(2), [placement()] * 2)
    lost: list[ServingError] = []
    group.watch(lost.append)
    [watcher] = [thread for thread in threading.enumerate() if thread.name == "shoal-ranks"]
    end(group)
    watcher.join(PATIENCE)
    assert (watcher.is_alive(), lost, maker.nothing_left) == (False, [], True)


def test_whoever_waits_for_a_result_is_released_by_the_end(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr("tests.support.fake_shards.answer", lambda _: hangs.wait(PATIENCE))
    group = maker.start(group_config(2), [placement()] * 2)
    group.submit(decode_plan(0))
    waiting = blocked(group.result)
    GroupExecutor.shutdown(group)
    with pytest.raises(EngineError, match="closed"):
        waiting.result(PATIENCE)
    hangs.set()
