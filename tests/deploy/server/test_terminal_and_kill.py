"""What happens to a running server from outside: Ctrl-C in its terminal, and the death of a replica under a stream."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.served import START_SECONDS, Served, processes_of, start, wait_until

pytestmark = pytest.mark.slow


def read_terminal(terminal: int, word: bytes, seconds: float) -> bytes:
    """What a terminal shows until `word` comes or its program ends."""
    shown, deadline = b"", time.monotonic() + seconds
    while word not in shown and select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # no process has the other end any more
            break
    return shown


def test_ctrl_c_in_a_terminal_leaves_nothing_behind() -> None:
    """Every process in the foreground gets the signal there, Ray's too, and not the server alone."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir("/tmp")
        os.environ.pop("RAY_AUTH_MODE", None)
        os.execv(sys.executable, [sys.executable, "-m", "shoal.deploy.cli", "serve", "tiny", "--port", "0"])
    try:
        assert b"Ctrl-C" in read_terminal(terminal, b"Ctrl-C", START_SECONDS)
        folder = re.search(r"/tmp/shoal-ray-\w+", " ".join(processes_of(pid)))
        assert folder is not None
        os.write(terminal, b"\x03")
        assert b"shoal: stopped" in read_terminal(terminal, b"shoal: stopped", 60)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert wait_until(lambda: processes_of(pid) == []), processes_of(pid)
        assert not Path(folder[0]).exists()
    finally:
        os.close(terminal)


def busy_replica(server: Served) -> int:
    """The process of the replica that has a request, found by the processor time that it takes."""
    replicas = [
        int(folder.name)
        for folder in Path("/proc").iterdir()
        if folder.name.isdecimal() and is_replica(folder, server.process.pid)
    ]
    assert len(replicas) == 2
    before = {pid: cpu_ticks(pid) for pid in replicas}
    assert wait_until(lambda: max(cpu_ticks(pid) - before[pid] for pid in replicas) > 10)
    return max(replicas, key=lambda pid: cpu_ticks(pid) - before[pid])


def is_replica(folder: Path, session: int) -> bool:
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        return int(fields[3]) == session and ":Replica-tiny" in (folder / "cmdline").read_text()
    except OSError:  # it has just ended
        return False


def cpu_ticks(pid: int) -> int:
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_stream_goes_on_when_its_replica_is_killed() -> None:
    server = start("--num-replicas", "2")
    body = {"prompt": "import os\n", "n": 2, "max_tokens": 700, "seed": 3, "ignore_eos": True}
    try:
        expected = [c["text"] for c in server.http.post("/v1/completions", json=body).json()["choices"]]
        texts, killed = ["", ""], False
        with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    texts[choice["index"]] += choice["text"]
                if not killed:
                    os.kill(busy_replica(server), signal.SIGKILL)
                    killed = True
        assert texts == expected
        assert re.search(
            r'^shoal_requests_migrated_total{.*reason="replica_lost"} 2', server.http.get("/metrics").text, re.M
        )
        # A new one takes its place, and nothing of the old one is held.
        assert wait_until(lambda: len(server.http.get("/debug/blocks").json()["tiny"]) == 2)
        for replica in server.http.get("/debug/blocks").json()["tiny"]:
            assert replica["num_free_blocks"] == replica["num_blocks"]
    finally:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(120) == 0
