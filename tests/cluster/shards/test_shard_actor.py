"""A rank as a Ray actor: its visible GPUs, and how its end reaches the group."""

from __future__ import annotations

import os
import signal
import subprocess
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from shoal.cluster.shards import shard_actor
from shoal.cluster.shards.placement import ActorPlacement
from shoal.cluster.shards.shard_actor import ShardActor, ShardActorHandle, build_sharded_engine
from shoal.replicas.config import EngineConfig, ModelConfig, ParallelConfig
from shoal.replicas.errors import ConfigError, ModelError, ShardGroupError
from tests.support.fake_shards import group_config


@pytest.mark.parametrize(("visible", "seen"), [(("2", "3"), "2,3"), ((), "7")])
def test_a_rank_sees_all_gpus_of_its_group(
    monkeypatch: pytest.MonkeyPatch, visible: tuple[str, ...], seen: str
) -> None:
    """Overrides Ray's choice; without GPUs, the user's setting stays."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr("shoal.replicas.executors.shard_rank.ShardRank", lambda *args: made.append(args))
    config = group_config(2)
    ShardActor().assign(config, 1, 0, visible)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], made) == (seen, [(config, 1, 0)])


class FakeActor:
    """A fake Ray actor for ShardActorHandle; the test resolves the futures of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[object, ...], Future[Any]]] = []
        self.killed = 0

    def __getattr__(self, method: str) -> Any:
        def options(*, name: str) -> Any:
            def remote(*args: object) -> Any:
                future: Future[Any] = Future()
                self.calls.append((method, name, args, future))
                return SimpleNamespace(future=lambda: future)

            return SimpleNamespace(remote=remote)

        return SimpleNamespace(options=options)


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> FakeActor:
    made = FakeActor()

    def kill(killed: object) -> None:
        assert killed is made
        made.killed += 1

    options = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: made))
    monkeypatch.setattr(ray, "remote", lambda _: options)
    monkeypatch.setattr(ray, "kill", kill)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    return made


def a_handle() -> ShardActorHandle:
    group: Any = SimpleNamespace(bundle_specs=[{"CPU": 1.0}, {"CPU": 1.0}])
    return ShardActorHandle(group, 1)


def test_what_a_rank_raises_comes_as_it_was(actor: FakeActor) -> None:
    answer = a_handle().call("load")
    [(method, _, _, future)] = actor.calls
    error = ModelError("model.safetensors is truncated")
    future.set_exception(RayTaskError(method, "traceback", error).as_instanceof_cause())
    assert answer.exception(1) is error


def test_the_end_of_a_rank_is_told_in_one_line(actor: FakeActor) -> None:
    answer = a_handle().call("serve", "/tmp/steps", b"token")
    said = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: ShardActor\n\tpid: 7\n"
        "The actor is dead because its worker process has died. Some common causes include: (1) the OOM killer"
    )
    actor.calls[0][3].set_exception(RayActorError(error_msg=said))
    error = answer.exception(1)
    assert isinstance(error, ShardGroupError)
    assert error.message == "its process has ended (The actor is dead because its worker process has died.)"


def test_the_title_of_a_process_names_its_rank_and_replica(actor: FakeActor) -> None:
    handle = a_handle()
    handle.call("placement")
    handle.assigned(3, 4, ActorPlacement("elsewhere", "10.0.0.1", 1, ()))
    handle.call("load")
    assert str(handle) == "rank 3 of 4 (node 10.0.0.1, process 1)"
    assert [name for _, name, _, _ in actor.calls] == ["shard.placement", f"shard 3 of replica {os.getpid()}.load"]


def test_a_stopped_rank_of_this_node_is_seen_and_ended(actor: FakeActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_actor, "_KILL_GRACE_MS", 1)
    with subprocess.Popen(["sleep", "1000"]) as process:
        handle = a_handle()
        handle.assigned(0, 1, ActorPlacement("here", "127.0.0.1", process.pid, ()))
        assert not handle.is_stopped()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert handle.is_stopped()
        handle.kill()
        assert process.wait(20) == -signal.SIGKILL
        handle.kill()
        assert not handle.is_stopped()
    assert actor.killed == 2


def test_a_process_of_another_node_is_left_to_ray(actor: FakeActor) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        handle = a_handle()
        handle.assigned(0, 1, ActorPlacement("elsewhere", "10.0.0.1", process.pid, ()))
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert not handle.is_stopped()  # another process there may have this one's number
        handle.kill()
        assert (actor.killed, process.poll()) == (1, None)
        process.kill()


@pytest.mark.parametrize(
    ("bundles", "device", "message"),
    [
        (None, "cpu", "placement group of 3 bundles, and this one has none"),
        ([{"CPU": 1}] * 2, "cpu", "3 bundles, and this one has 2 bundles"),
        ([{"CPU": 1}] * 3, "cuda", "have no GPU"),
    ],
)
def test_a_deployment_without_bundles_for_its_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, bundles: list[dict[str, float]] | None, device: str, message: str
) -> None:
    group = None if bundles is None else SimpleNamespace(bundle_specs=bundles, bundle_count=len(bundles))
    monkeypatch.setattr(ray.util, "get_current_placement_group", lambda: group)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    config = EngineConfig(ModelConfig("deploy/models/tiny"), parallel=ParallelConfig(2), device=device)
    with pytest.raises(ConfigError, match=message):
        build_sharded_engine(config, timeout_s=1.0)
