"""Two nodes on one machine: network namespaces joined by a cable that can be cut, and two raylets of one Ray."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.checkpoints import FAMILIES
from tests.support.netns import Namespace, two_nodes
from tests.support.node_shard import Group, group_on
from tests.support.step_processes import StepProcesses, said, step_processes, tell

ROOT = Path(__file__).parents[3]
NOTICED_SECONDS = 15  # by which both sides of a cut link have left; they notice it after 8


@pytest.fixture
def nodes() -> Iterator[tuple[Namespace, Namespace]]:
    with two_nodes() as made:
        yield made


@pytest.fixture
def processes() -> Iterator[StepProcesses]:
    with step_processes() as made:
        yield made


@pytest.mark.slow
def test_an_idle_connection_notices_a_cut_link_on_both_sides(
    nodes: tuple[Namespace, Namespace], processes: StepProcesses
) -> None:
    """The engine waits for a stopped rank of its own node: no data is in flight between the nodes."""
    here, there = nodes
    engine = processes.start("engine", here.address, 2, within=here.entered())
    address = said(engine)
    near, far = (
        processes.start("rank", address, 0, 2, within=here.entered()),
        processes.start("rank", address, 1, 2, within=there.entered()),
    )
    assert said(engine) == "41"  # all are there, and have worked
    os.kill(near.pid, signal.SIGSTOP)
    tell(engine)
    there.cut()
    assert "PeerLost: rank 1 of 2 is gone" in engine.communicate(timeout=NOTICED_SECONDS)[0]
    assert "PeerLost: the engine of rank 1 is gone" in far.communicate(timeout=NOTICED_SECONDS)[0]
    os.kill(near.pid, signal.SIGCONT)
    near.communicate(timeout=NOTICED_SECONDS)


@pytest.mark.slow
def test_a_plan_that_never_arrives_is_noticed(nodes: tuple[Namespace, Namespace], processes: StepProcesses) -> None:
    here, there = nodes
    engine = processes.start("engine", here.address, 1, within=here.entered())
    far = processes.start("rank", said(engine), 0, 1, within=there.entered())
    assert said(engine) == "41"
    there.cut()
    tell(engine)
    assert "PeerLost: rank 0 of 1 is gone" in engine.communicate(timeout=NOTICED_SECONDS)[0]
    assert "PeerLost: the engine of rank 0 is gone" in far.communicate(timeout=NOTICED_SECONDS)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(FAMILIES["llama"](tmp_path_factory.mktemp("llama")))


def config(checkpoint: str, tp: int, pp: int) -> EngineConfig:
    """Chunked prompts, and a block pool too small for all sequences."""
    return EngineConfig(
        ModelConfig(checkpoint, max_model_len=128),
        CacheConfig(num_blocks=12),
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
        ParallelConfig(tp, pp),
        num_threads=1,
    )


def requests() -> list[Request]:
    prompts = [tuple(range(5 + i, 5 + i + length)) for i, length in enumerate((3, 50, 50, 17, 70))]
    greedy = [
        Request(f"{i}", prompt, SamplingParams(max_tokens=24, temperature=0.0)) for i, prompt in enumerate(prompts)
    ]
    return [
        *greedy,
        Request("drawn", prompts[3], SamplingParams(max_tokens=24, temperature=1.0, seed=5), num_samples=2),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp", "num_far"), [(2, 1, 1), (1, 2, 1), (2, 2, 2), (2, 1, 2)])
def test_ranks_on_two_nodes_give_the_tokens_of_one_process(
    nodes: tuple[Namespace, Namespace], checkpoint: str, tp: int, pp: int, num_far: int
) -> None:
    """The last `num_far` ranks are not on the engine's node."""
    here, there = nodes
    engine = build_engine(config(checkpoint, 1, 1))
    expected = generate(engine, requests())
    engine.shutdown()
    placements = [here] * (tp * pp - num_far) + [there] * num_far
    with group_on(config(checkpoint, tp, pp), here, placements) as group:
        found = generate(group.engine, requests())
    assert {key: [each.token_ids for each in some] for key, some in found.items()} == {
        key: [each.token_ids for each in some] for key, some in expected.items()
    }


@pytest.mark.slow
def test_a_link_that_is_down_for_two_seconds_costs_no_token(
    nodes: tuple[Namespace, Namespace], checkpoint: str
) -> None:
    here, there = nodes
    engine = build_engine(config(checkpoint, 1, 1))
    expected = generate(engine, [request := requests()[0]])
    engine.shutdown()
    with group_on(config(checkpoint, 2, 1), here, [here, there]) as group:
        group.engine.add_request(request)
        tokens = [token for delta in group.engine.step() for token in delta.token_ids]
        there.cut()
        waiting = threading.Timer(2.0, there.mend)
        waiting.start()
        while group.engine.has_work:
            tokens += [token for delta in group.engine.step() for token in delta.token_ids]
        waiting.join()
        assert group.engine.failure is None
    assert tokens == expected[request.request_id][0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_rank_behind_a_cut_link_is_missed_and_leaves_by_itself(
    nodes: tuple[Namespace, Namespace], checkpoint: str, tp: int, pp: int
) -> None:
    """It waits in a collective or a receive, where no other process can end it."""
    here, there = nodes
    endless = SamplingParams(max_tokens=100, ignore_eos=True)
    with group_on(config(checkpoint, tp, pp), here, [here, there]) as group:
        group.engine.add_request(Request("endless", (5, 6, 7), endless))
        while not group.engine.step():
            pass
        there.cut()
        while group.engine.failure is None:
            assert group.engine.has_work, "it has ended before the link was missed"
            group.engine.step()
        assert re.search(r"rank 1 of 2 is gone", str(group.engine.failure))
        near, far = group.shards
        assert far.has_left(NOTICED_SECONDS)
        group.engine.shutdown()
        assert near.has_left(0.0)


@pytest.mark.slow
def test_a_rank_that_cannot_reach_the_others_is_named(nodes: tuple[Namespace, Namespace], checkpoint: str) -> None:
    here, there = nodes
    there.cut()
    with pytest.raises(
        ShardGroupError, match=r"could not form the process group: .*rank 1 .*cannot reach the group's store"
    ):
        Group(config(checkpoint, 2, 1), here, [here, there])


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_replica_over_two_raylets_outlives_one_of_them(checkpoint: str, tp: int, pp: int) -> None:
    """The second node, which has only ranks, is killed during a request."""
    command = [sys.executable, "-m", "tests.support.two_raylets", checkpoint, str(tp), str(pp)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    head, *ranks = seen["nodes"]
    assert ranks[0] == head != ranks[1]
    assert seen["undisturbed"] == seen["alone"]
    assert seen["reason"] == "NO_RESOURCES"
    assert seen["killed"] == seen["alone"]
    assert seen["nodes after"][:2] == [head, head]
    assert seen["nodes after"][2] not in seen["nodes"]
