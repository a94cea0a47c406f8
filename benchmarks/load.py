"""Load generator: a cheap client, and the CPU time of processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class StreamTimes:
    """One stream as its client saw it; `time.perf_counter` seconds."""

    sent: float
    first: float
    last: float
    num_events: int


class StreamClient(asyncio.Protocol):
    """One POST on one connection, answered with server-sent events.

    Counts events by their ends without parsing; `raw` keeps all bytes.
    """

    def __init__(self, request: bytes) -> None:
        self.done: asyncio.Future[StreamTimes] = asyncio.get_running_loop().create_future()
        self.raw = bytearray()
        self._request = request
        self._sent = self._first = self._last = 0.0
        self._num_events = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        # An event ends with an empty line, perhaps split over two reads. HTTP's own lines end with
        # \r\n.
        joint = self.raw[-1:] == b"\n" and data[:1] == b"\n"
        num_new = data.count(b"\n\n") + joint
        self.raw += data
        if num_new:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self._num_events += num_new
        if self.raw.endswith(b"0\r\n\r\n") and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.done.done():
            return
        if not self.raw.startswith(b"HTTP/1.1 200") or b"data: [DONE]" not in self.raw[-200:]:
            text = self.raw.decode(errors="replace")
            self.done.set_exception(exc or RuntimeError(f"incomplete stream: {text[:300]} ... {text[-300:]}"))
            return
        self.done.set_result(StreamTimes(self._sent, self._first, self._last, self._num_events))

    def events(self) -> list[bytes]:
        """The answer's events in order, each with its empty line."""
        body = self.raw.partition(b"\r\n\r\n")[2]
        payload = bytearray()
        while body:
            size, _, rest = body.partition(b"\r\n")
            payload += rest[: int(size, 16)]
            body = rest[int(size, 16) + 2 :]
        return [part + b"\n\n" for part in bytes(payload).split(b"\n\n") if part]


def post(path: str, body: dict[str, Any]) -> bytes:
    """The bytes of a POST with a JSON body."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    )
    return f"{head}\r\n\r\n".encode() + payload


async def stream(host: str, port: int, request: bytes) -> StreamClient:
    """Send one request and read the whole answer; raises RuntimeError for an incomplete stream."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: StreamClient(request), host, port)
    await client.done
    return client


async def stream_many(host: str, port: int, requests: Sequence[bytes]) -> list[StreamTimes]:
    clients = await asyncio.gather(*(stream(host, port, request) for request in requests))
    return [client.done.result() for client in clients]


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes so far; ended processes count nothing."""
    total = 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_SECOND


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat after the name, which may hold anything; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
