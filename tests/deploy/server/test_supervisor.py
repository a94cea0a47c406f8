"""The supervisor of a minimal server: signals, statuses and cleanup."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.served import processes_of, running

# A server that has started a process in a group of its own, as Ray's workers have, and has logs as Ray does.
SERVER = """
import os, subprocess, sys, threading
from shoal.deploy.server.supervisor import say, under_supervisor
folder = under_supervisor()
try:
    logs = folder / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "gcs_server.out").write_text("out of memory")
    left = subprocess.Popen(["sleep", "1000"], process_group=0, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(os.getppid(), os.getpid(), left.pid, folder, flush=True)
    if sys.argv[1:]:
        sys.exit(int(sys.argv[1]))
    threading.Event().wait()
except KeyboardInterrupt:
    say("stopped")
"""


class Kept:
    """The server under its supervisor, in a session of its own."""

    def __init__(self, *arguments: str, wrapper: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", SERVER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        supervisor, server, left, folder = self.process.stdout.readline().split()
        self.supervisor, self.server, self.left, self.folder = int(supervisor), int(server), int(left), Path(folder)

    def end(self) -> tuple[int, str, str]:
        """Status, output and errors, once it has ended."""
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors

    def nothing_left(self) -> bool:
        return not processes_of(self.process.pid) and not self.folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to", ["supervisor", "group", "server"])
def test_a_signal_stops_the_server_once_and_all_of_it_goes(number: signal.Signals, to: str) -> None:
    kept = Kept()
    assert os.getpgid(kept.server) == kept.server, "a signal for the caller's group must not reach the server"
    if to == "group":
        os.killpg(kept.process.pid, number)
    else:
        os.kill(kept.supervisor if to == "supervisor" else kept.server, number)
    assert kept.end() == (0, "shoal: stopping\nstopped\n", "")
    assert kept.nothing_left()


def test_a_server_whose_supervisor_is_killed_is_interrupted() -> None:
    kept = Kept()
    os.kill(kept.supervisor, signal.SIGKILL)
    status, out, _ = kept.end()  # the output closes when the server has ended too
    os.kill(kept.left, signal.SIGKILL)  # `shoal serve` itself ends its Ray, and removes the folder
    shutil.rmtree(kept.folder)
    assert (status, out) == (-signal.SIGKILL, "shoal: stopping\nstopped\n")


def test_a_server_that_is_killed_leaves_its_logs_alone() -> None:
    kept = Kept()
    os.kill(kept.server, signal.SIGKILL)
    status, _, errors = kept.end()
    found = re.fullmatch(
        r"shoal: error: the server was ended by SIGKILL\nshoal: the logs of all processes are kept in (\S+)\n", errors
    )
    assert status == 128 + signal.SIGKILL
    assert found is not None, errors
    assert (Path(found[1]) / "gcs_server.out").read_text() == "out of memory"
    shutil.rmtree(found[1])
    assert kept.nothing_left()


@pytest.mark.parametrize("status", [0, 2])
def test_a_server_ends_with_its_own_status(status: int) -> None:
    kept = Kept(str(status))
    assert kept.end()[0] == status
    assert kept.nothing_left()
    logs = kept.folder.with_name(f"{kept.folder.name}-logs")
    assert logs.exists() == (status != 0)
    shutil.rmtree(logs, ignore_errors=True)


def test_under_nohup_a_server_outlives_its_terminal() -> None:
    kept = Kept(wrapper=("nohup",))
    os.killpg(kept.process.pid, signal.SIGHUP)
    os.kill(kept.server, signal.SIGHUP)
    os.killpg(kept.process.pid, signal.SIGTERM)
    assert kept.end()[:2] == (0, "shoal: stopping\nstopped\n")


def test_what_a_script_had_started_before_is_left_alone() -> None:
    kept = Kept("0", wrapper=("sh", "-c", 'sleep 1000 > /dev/null 2>&1 & exec "$@"', "sh"))
    assert kept.end()[0] == 0
    [(sleeps, command)] = running(kept.process.pid)
    os.kill(sleeps, signal.SIGKILL)
    assert command.startswith("sleep 1000")


def test_it_stops_when_its_output_is_closed() -> None:
    kept = Kept()
    assert kept.process.stdout is not None
    kept.process.stdout.close()
    os.kill(kept.supervisor, signal.SIGTERM)
    assert kept.process.wait(60) == 0
    assert kept.process.stderr is not None
    with kept.process.stderr as errors:
        assert errors.read() == ""
    assert kept.nothing_left()
