"""A failed start reports the first cause, even if a process ended without an exception, and keeps the logs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.deploy.server.launcher import end_of
from shoal.deploy.server.start_logs import explain
from shoal.replicas.errors import EngineError, ShardGroupError
from tests.support.served import processes_of, wait_until

CRASH = """:job_id:01000000
:actor_name:{actor}
INFO 2026-01-01 10:00:00 serve 9 -- ready
terminate called after throwing an instance of 'c10::Error'
  what(): {cause}
*** SIGABRT received at time=1 on cpu 0 ***
PC: @     0x7f3815ca8eec  (unknown)  (unknown)
[2026-01-01 10:00:00,214 E 9 9] logging.cc:474: *** SIGABRT received at time=1 on cpu 0 ***
Fatal Python error: Aborted
"""
ENDED = "the ranks could not load: rank 1 of 2 (node 127.0.0.1, process 12): its process has ended (it died)"


class Logs:
    """A Ray's temporary folder, in which processes have written what they wrote, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ray"
        self._logs = self.folder / "session_2026-01-01_10-00-00" / "logs"
        self._logs.mkdir(parents=True)
        (self.folder / "session_latest").symlink_to(self._logs.parent)
        self._written = 0

    def write(self, pid: int, text: str) -> None:
        file = self._logs / f"worker-{pid:056x}-01000000-{pid}.err"
        file.write_text(text)
        self._written += 1
        os.utime(file, (self._written, self._written))

    def notes(self, error: Exception) -> list[str]:
        explain(error, self.folder)
        return error.__notes__


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


def test_the_process_that_crashed_first_is_quoted_up_to_its_crash(logs: Logs) -> None:
    logs.write(10, ":actor_name:ServeReplica:shoal:Ingress\nnothing of note\n")
    logs.write(11, ":job_id:ffffffff\n*** SIGABRT of a worker that is no actor of ours\n")
    logs.write(13, CRASH.format(actor="ShardActor", cause="out of handles"))
    logs.write(12, CRASH.format(actor="ServeReplica:shoal:Replica-tiny", cause="its rank is gone"))
    words, kept = logs.notes(EngineError("Deploying failed."))
    assert words.splitlines() == [
        "process 13, a rank, wrote last:",
        "  terminate called after throwing an instance of 'c10::Error'",
        "    what(): out of handles",
        "  *** SIGABRT received at time=1 on cpu 0 ***",
    ]
    folder = Path(kept.removeprefix("the logs of all processes are kept in "))
    assert "out of handles" in (folder / f"worker-{13:056x}-01000000-13.err").read_text()


def test_a_process_that_is_said_to_have_ended_is_quoted(logs: Logs) -> None:
    logs.write(11, ":actor_name:ShardActor\nnothing of note\n")
    logs.write(12, ":actor_name:ShardActor\n" + "".join(f"line {i}\n" for i in range(9)))
    words, _ = logs.notes(ShardGroupError(ENDED))
    assert words.splitlines()[1:] == [f"  line {i}" for i in range(4, 9)]


def test_a_process_that_has_written_nothing_is_not_quoted(logs: Logs) -> None:
    logs.write(12, ":job_id:01000000\n:actor_name:ShardActor\n")
    assert len(logs.notes(ShardGroupError(ENDED))) == 1


def test_without_logs_there_is_no_note(tmp_path: Path) -> None:
    error = RuntimeError("Ray did not start")
    explain(error, tmp_path)
    assert not hasattr(error, "__notes__")


def test_what_a_message_of_serves_comes_to() -> None:
    died = "The actor is dead because its worker process has died. Exit type: SYSTEM_ERROR"
    listed = f"Traceback:\n  ...\n{died} Some common causes include: (1) ...\nThe actor never ran.\n"
    assert end_of(listed) == died
    assert end_of("It failed to start. Error:\nActorDiedError() \n\n") == "The process of a replica has ended."
    assert end_of("Traceback\nRuntimeError: no memory\n") == "RuntimeError: no memory"
    assert end_of(" \n") is None


# What Python runs as it starts, where its path leads there.
_RANKS_END = """
import os, sys
class Fault:
    def find_spec(self, name, path=None, target=None):
        if name == "shoal.replicas.executors.shard_rank":
            os.write(2, b"libfast.so: no such symbol\\n")
            os._exit(3)
sys.meta_path.insert(0, Fault())
"""


@pytest.mark.slow
def test_ranks_that_end_as_they_start_are_quoted_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_RANKS_END)
    command = [sys.executable, "-m", "shoal.deploy.cli", "serve", "tiny", "-tp", "2", "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd="/tmp",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert re.search(r"shoal: error: the ranks could not prepare: rank \d of 2 \(.*: its process has ended", errors)
    assert re.search(r"^shoal: process \d+, a rank, wrote last:\n  libfast\.so: no such symbol$", errors, re.MULTILINE)
    said = re.search(r"^shoal: the logs of all processes are kept in (\S+)$", errors, re.MULTILINE)
    assert said is not None, errors
    kept = Path(said[1])
    try:
        assert any("no such symbol" in file.read_text() for file in kept.glob("worker-*.err"))
        assert not kept.with_name(kept.name.removesuffix("-logs")).exists()
    finally:
        shutil.rmtree(kept)
    assert wait_until(lambda: processes_of(process.pid) == []), processes_of(process.pid)
