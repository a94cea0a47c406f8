"""Two nodes on one machine: network namespaces joined by a cable that can be cut, and two raylets of one Ray."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.netns import Namespace, two_nodes

ROOT = Path(__file__).parents[2]
NOTICED_SECONDS = 15  # by which both sides of a cut link have left; they notice it after 8


@pytest.fixture
def nodes() -> Iterator[tuple[Namespace, Namespace]]:
    with two_nodes() as made:
        yield made


class Processes:
    """Processes in namespaces, ended with the test."""

    def __init__(self) -> None:
        self.token = secrets.token_bytes(32)
        self.all: list[subprocess.Popen[str]] = []

    def start(self, node: Namespace, *arguments: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            node.command(sys.executable, *map(str, arguments)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.all.append(process)
        return process

    def step_rank(self, node: Namespace, *arguments: Any) -> subprocess.Popen[str]:
        process = self.start(node, "-m", "tests.support.step_rank", *arguments)
        tell(process, self.token.hex())
        return process


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    for process in made.all:
        process.kill()
        process.communicate()


def tell(process: subprocess.Popen[str], line: str = "") -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.slow
def test_an_idle_connection_notices_a_cut_link_on_both_sides(
    nodes: tuple[Namespace, Namespace], processes: Processes
) -> None:
    """The engine waits for a rank of its own node that is stopped: no byte is on its way over the cable."""
    here, there = nodes
    engine = processes.step_rank(here, "engine", here.address, 2)
    address = said(engine)
    near, far = processes.step_rank(here, "rank", address, 0, 2), processes.step_rank(there, "rank", address, 1, 2)
    assert said(engine) == "41"  # all are there, and have worked
    os.kill(near.pid, signal.SIGSTOP)
    tell(engine)
    there.cut()
    assert "PeerLost: rank 1 of 2 is gone" in engine.communicate(timeout=NOTICED_SECONDS)[0]
    assert "PeerLost: the engine of rank 1 is gone" in far.communicate(timeout=NOTICED_SECONDS)[0]
    os.kill(near.pid, signal.SIGCONT)
    near.communicate(timeout=NOTICED_SECONDS)


@pytest.mark.slow
def test_a_plan_that_never_arrives_is_noticed(nodes: tuple[Namespace, Namespace], processes: Processes) -> None:
    here, there = nodes
    engine = processes.step_rank(here, "engine", here.address, 1)
    far = processes.step_rank(there, "rank", said(engine), 0, 1)
    assert said(engine) == "41"
    there.cut()
    tell(engine)
    assert "PeerLost: rank 0 of 1 is gone" in engine.communicate(timeout=NOTICED_SECONDS)[0]
    assert "PeerLost: the engine of rank 0 is gone" in far.communicate(timeout=NOTICED_SECONDS)[0]
