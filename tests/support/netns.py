"""Network namespaces joined by a virtual cable: two nodes on one machine, with a link that can be cut.

A namespace has no name and belongs to a process that sleeps until the test's end of a pipe closes. So the kernel
removes namespaces, addresses and cable when the last process in them ends, also where the test itself is killed.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_DEVICE = "cable0"  # either end of it
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Namespace:
    """A node. address: on the cable, where the other node reaches it."""

    pid: int  # of the process that keeps it
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread is in the namespace meanwhile, and the sockets and processes that it makes stay there."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            with Path(f"/proc/{self.pid}/ns/net").open() as there:
                _enter(there.fileno())
            try:
                yield
            finally:
                _enter(own)
        finally:
            os.close(own)

    def ip(self, *words: str) -> None:
        with self.entered():
            subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def cut(self) -> None:
        """Take the cable's end here down: the other end loses its carrier, and packets go nowhere."""
        self.ip("link", "set", _DEVICE, "down")

    def mend(self) -> None:
        self.ip("link", "set", _DEVICE, "up")


@contextmanager
def two_nodes() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces joined by a cable. Skips the test where this user or machine may not make them."""
    with _namespace("10.99.0.1") as left, _namespace("10.99.0.2") as right:
        _run(
            *("ip", "link", "add", _DEVICE, "netns", str(left.pid), "type", "veth"),
            *("peer", "name", _DEVICE, "netns", str(right.pid)),
        )
        for node in (left, right):
            node.ip("address", "add", f"{node.address}/24", "dev", _DEVICE)
            for device in ("lo", _DEVICE):
                node.ip("link", "set", device, "up")
        yield left, right


@contextmanager
def _namespace(address: str) -> Iterator[Namespace]:
    # `cat` says that it runs, and by then the namespace is there.
    try:
        holder = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces: {error}")
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    with holder:
        try:
            holder.stdin.write(b"\n")
            holder.stdin.flush()
            started = holder.stdout.readline()
        except BrokenPipeError:
            started = b""
        if not started:
            pytest.skip(f"no network namespaces: {holder.stderr.read().decode().strip()}")
        try:
            yield Namespace(holder.pid, address)
        finally:
            holder.kill()


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces: {error}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual cable between network namespaces: {error.stderr.strip()}")
