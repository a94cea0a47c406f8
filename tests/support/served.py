"""A running `shoal serve tiny`: started as users start it, and looked at from outside."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

START_SECONDS = 180


class Starting:
    """A `shoal serve tiny` with small limits and options of the caller's own, and what it prints."""

    def __init__(self, *more: str) -> None:
        # A session of its own: everything that it starts can be found by the session's id.
        options = ["--port", "0", "--max-model-len", "1024", "--num-gpu-blocks-override", "2048", *more]
        # Ray's tokens as users have them, not off as for the other tests.
        env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.deploy.cli", "serve", "tiny", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            cwd="/tmp",
            env=env,
        )
        self.output = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def read_until(self, word: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while word not in self.output:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            assert line is not None, f"it ended before it said {word!r}:\n{self.output}"
            self.output += line

    def read_to_the_end(self) -> str:
        """All that it printed, once no process holds its output open."""
        while (line := self._lines.get(timeout=120)) is not None:
            self.output += line
        return self.output


@dataclass
class Served:
    """A running `shoal serve`, and what it printed up to its readiness."""

    process: subprocess.Popen[str]
    output: str
    starting: Starting
    http: httpx.Client
    openai: openai.OpenAI


def start(*more: str) -> Served:
    """`shoal serve tiny` once it answers."""
    starting = Starting(*more)
    starting.read_until("Ctrl-C")
    found = re.search(r"http://127\.0\.0\.1:\d+", starting.output)
    assert found is not None
    client = openai.OpenAI(base_url=f"{found[0]}/v1", api_key="none", max_retries=0, timeout=120)
    http = httpx.Client(base_url=found[0], timeout=120)
    return Served(starting.process, starting.output, starting, http, client)


def ray_folder(session: int) -> Path:
    """The folder of the Ray that a session's processes are of."""
    found = re.search(r"/tmp/shoal-ray-\w+", " ".join(processes_of(session)))
    assert found is not None
    return Path(found[0])


def processes_of(session: int) -> list[str]:
    """The command lines of a session's processes that still run."""
    return [command for _, command in running(session)]


def running(session: int) -> Iterator[tuple[int, str]]:
    """The processes of a session that still run: ids and command lines."""
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if folder.name.isdecimal() and int(fields[3]) == session and fields[0] != "Z":
                yield int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has just ended
            continue


def listeners_of(session: int) -> dict[int, bool]:
    """The ports on which a session's processes listen, and whether only this machine can reach them."""
    ports: dict[str, tuple[int, bool]] = {}  # by the socket's inode
    for table, loopback in (("tcp", ("0100007F",)), ("tcp6", ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"))):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            host, port = local.split(":")
            if state == "0A":
                ports[inode] = int(port, 16), host in loopback
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if not folder.name.isdecimal() or int(fields[3]) != session:
                continue
            links = [str(link.readlink()) for link in (folder / "fd").iterdir()]
        except OSError:  # it has just ended
            continue
        found.update(ports[link[8:-1]] for link in links if link.startswith("socket:") and link[8:-1] in ports)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
