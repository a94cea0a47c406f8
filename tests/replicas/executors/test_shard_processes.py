"""Groups of local processes that fail: the error says which rank and why, and nothing is left behind."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shoal.replicas.engine.engine import Engine
from shoal.replicas.engine.engine_thread import EngineThread
from shoal.replicas.errors import ConfigError, EngineError, ModelError, ShardGroupError
from shoal.replicas.executors.shard_processes import ShardProcesses, start_shard_processes
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.offline import build_engine
from shoal.replicas.protocol import FinishReason, Request, SamplingParams
from tests.support.checkpoints import FAMILIES
from tests.support.golden import PROMPTS, engine_config
from tests.support.processes import children, cpu_seconds, wait_for_children, wait_for_end

pytestmark = pytest.mark.slow

LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path_factory, monkeypatch):
    folder, before = tmp_path_factory.mktemp("temporary"), children()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it has been read from the environment before
    yield
    assert children() == before
    assert list(folder.iterdir()) == []


def start(folder: Path, tp: int = 2) -> ShardProcesses:
    config = engine_config(folder, tp).resolve(read_model_facts(folder), "cpu")
    return start_shard_processes(config, timeout_s=240)


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_ranks_say_what_their_engines_process_would(level, folder, caplog, capfd):
    caplog.set_level(level, "shoal")
    start(folder).shutdown()
    said = capfd.readouterr().err
    assert [f"rank {rank}: {folder} is ready on cpu" in said for rank in range(2)] == [level == logging.INFO] * 2


@pytest.fixture
def serving(folder):
    """An engine in the middle of a request, and its ranks' processes."""
    before = children()
    engine = build_engine(engine_config(folder, tp=2))
    engine.add_request(Request("1", PROMPTS[0], LONG))
    while not engine.step():
        pass
    yield engine, sorted(children() - before)
    engine.shutdown()


def run_until_it_fails(engine: Engine) -> None:
    """Its one sequence ends, once."""
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.ERROR]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_engine_and_is_named(serving, rank):
    engine, pids = serving
    os.kill(pids[rank], signal.SIGKILL)
    run_until_it_fails(engine)
    assert isinstance(engine.failure, EngineError)
    assert f"rank {rank} (process {pids[rank]}): it was killed by signal 9" in str(engine.failure)
    wait_for_end(set(pids))  # the other one leaves by itself


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3)])
def test_ranks_finish_the_steps_that_are_in_flight(tp, pp, folder):
    """A rank that left before its peers had taken what it sent them would make them fail."""
    engine = build_engine(engine_config(folder, tp, pp))
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(Request(str(i), prompt, LONG))
    while not engine.step():
        pass
    engine.submit()
    engine.shutdown()
    executor = engine._executor
    assert isinstance(executor, ShardProcesses)
    for rank in executor.ranks:
        assert "has ended with status 0" in str(rank.call("load").exception(0))


def test_a_stopped_rank_is_ended_with_the_group(serving):
    engine, pids = serving
    os.kill(pids[1], signal.SIGSTOP)
    engine.shutdown()
    wait_for_end(set(pids))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_waits_for_a_stopped_rank_ends_the_engine(serving, rank):
    """The rank is reported as stopped, long before the collective that waits for it times out."""
    engine, pids = serving
    os.kill(pids[rank], signal.SIGSTOP)
    run_until_it_fails(engine)
    assert f"waits for stopped processes: rank {rank} (process {pids[rank]})" in str(engine.failure)
    engine.shutdown()
    wait_for_end(set(pids))


def test_an_idle_server_uses_no_cpu(serving):
    """Neither the engine's thread, once it has answered a request, nor its ranks."""
    engine, ranks = serving
    while engine.has_work:
        engine.step()
    ended = threading.Event()
    thread = EngineThread(engine, lambda deltas: ended.set() if deltas[-1].finish_reason else None, print)
    thread.start()
    thread.submit(Request("2", PROMPTS[0], LONG))
    assert ended.wait(60)
    pids = [os.getpid(), *ranks]
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(2.0)  # the span that is measured
    spent = [cpu_seconds(pid) - earlier for pid, earlier in zip(pids, before, strict=True)]
    thread.stop()
    # The kernel counts in 10 ms, and rounds what a process does and what is done for it each by itself.
    assert max(spent) < 0.025, f"CPU seconds of an idle engine and two idle ranks in two seconds: {spent}"


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (signal.SIGKILL, r"rank 1 \(process {}\): it was killed by signal 9"),
        (signal.SIGSTOP, r"stopped .* for 5 s: rank 1 \(process {}\)"),
    ],
)
def test_a_rank_that_is_killed_or_stopped_while_it_starts_is_named(folder, by, said):
    before = children()
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start, folder)
        pids = wait_for_children(before, 2)
        os.kill(pids[1], by)
        with pytest.raises(ShardGroupError, match=said.format(pids[1])):
            starting.result()


def test_more_ranks_than_gpus_are_refused_before_anything_starts(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = engine_config(folder, tp=2, pp=2).resolve(read_model_facts(folder), "cuda")
    with pytest.raises(ConfigError, match="2 x pipeline_parallel_size 2 needs 4 GPUs, and this process sees 1"):
        start_shard_processes(config)


def test_a_damaged_checkpoint_is_what_the_ranks_say_it_is(tmp_path):
    folder = FAMILIES["llama"](tmp_path)
    weights = folder / "model.safetensors"
    config = engine_config(folder, 2).resolve(read_model_facts(folder), "cpu")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        start_shard_processes(config)


def test_a_group_that_does_not_start_in_time_is_taken_down(folder):
    config = engine_config(folder, 2).resolve(read_model_facts(folder), "cpu")
    with pytest.raises(ShardGroupError, match=r"could not open the store within 0 s .* no answer from rank 0"):
        start_shard_processes(config, timeout_s=0.0)


_ENGINE = """
import sys
import tempfile
from pathlib import Path
from shoal.replicas.offline import build_engine
from tests.support.golden import engine_config
engine = build_engine(engine_config(Path(sys.argv[1]), tp=2))
print("ready", flush=True)
sys.stdin.read()
"""


def test_ranks_end_with_an_engine_that_is_killed(folder):
    """The program has no main module to import and no guard around it, as in a notebook."""
    engine = subprocess.Popen(
        [sys.executable, "-c", _ENGINE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with engine:
        assert engine.stdout
        assert engine.stdout.readline() == b"ready\n"
        ranks = children(engine.pid)
        assert len(ranks) == 2
        engine.kill()
    wait_for_end(ranks)


def test_ranks_end_with_an_engine_that_is_killed_while_they_start(folder):
    engine = subprocess.Popen([sys.executable, "-c", _ENGINE, str(folder)], stdin=subprocess.PIPE)
    with engine:
        ranks = wait_for_children(set(), 2, engine.pid)
        engine.kill()
    wait_for_end(set(ranks))
