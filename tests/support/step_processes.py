"""Both ends of a step channel in processes of their own, ended with the test; see step_rank.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from shoal.replicas.channel.step_channel import StepChannelServer
from tests.support.step_group import TOKEN

ROOT = Path(__file__).parents[2]


class StepProcesses:
    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []

    def start(self, *arguments: Any, within: AbstractContextManager[Any] | None = None) -> subprocess.Popen[str]:
        """A process of step_rank with these arguments, started `within` a context (a network namespace, say)."""
        command = [sys.executable, "-m", "tests.support.step_rank", *map(str, arguments)]
        with within or nullcontext():
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.all.append(process)
        tell(process, TOKEN.hex())
        return process

    def ranks(self, server: StepChannelServer, world_size: int) -> list[subprocess.Popen[str]]:
        """All ranks of an engine in this process, connected."""
        address = server.path if server.address is None else "{}:{}".format(*server.address)
        started = [self.start("rank", address, rank, world_size) for rank in range(world_size)]
        server.accept(60)
        return started


@contextmanager
def step_processes() -> Iterator[StepProcesses]:
    made = StepProcesses()
    try:
        yield made
    finally:
        for process in made.all:
            process.kill()
            process.communicate()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> str:
    """The next line that the process says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
