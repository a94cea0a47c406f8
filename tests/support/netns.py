"""Network namespaces joined by a virtual cable: two nodes on one machine, with a link that can be cut.

A namespace has no name and belongs to a process that sleeps until the test's end of a pipe closes. So the kernel
removes namespaces, addresses and cable when the last process in them ends, also where the test itself is killed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

_DEVICE = "cable0"  # either end of it


@dataclass(frozen=True)
class Namespace:
    """A node. address: on the cable, where the other node reaches it."""

    pid: int  # of the process that keeps it
    address: str

    def command(self, *words: str) -> list[str]:
        """A command that runs in it; it becomes that command, and keeps its process id."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *words]

    def run(self, *words: str) -> None:
        subprocess.run(self.command(*words), check=True, capture_output=True, text=True)

    def cut(self) -> None:
        """Take the cable's end here down: the other end loses its carrier, and packets go nowhere."""
        self.run("ip", "link", "set", _DEVICE, "down")


@contextmanager
def two_nodes() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces joined by a cable. Skips the test where this user or machine may not make them."""
    with _namespace("10.99.0.1") as left, _namespace("10.99.0.2") as right:
        _run(
            *("ip", "link", "add", _DEVICE, "netns", str(left.pid), "type", "veth"),
            *("peer", "name", _DEVICE, "netns", str(right.pid)),
        )
        for node in (left, right):
            node.run("ip", "address", "add", f"{node.address}/24", "dev", _DEVICE)
            for device in ("lo", _DEVICE):
                node.run("ip", "link", "set", device, "up")
        yield left, right


@contextmanager
def _namespace(address: str) -> Iterator[Namespace]:
    # `cat` says that it runs, and by then the namespace is there.
    try:
        keeper = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces: {error}")
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    assert keeper.stderr is not None
    with keeper:
        try:
            keeper.stdin.write(b"\n")
            keeper.stdin.flush()
            started = keeper.stdout.readline()
        except BrokenPipeError:
            started = b""
        if not started:
            pytest.skip(f"no network namespaces: {keeper.stderr.read().decode().strip()}")
        try:
            yield Namespace(keeper.pid, address)
        finally:
            keeper.kill()


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual cable between network namespaces: {error.stderr.strip()}")
