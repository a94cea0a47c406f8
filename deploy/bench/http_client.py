"""A cheap client of streamed completions: it counts events and parses only the last ones.

One process handles more than 10,000 tokens/s, so that the server is what is measured. Each request
has its own connection. Times are `time.perf_counter` seconds.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import urlsplit

from ...replicas.errors import ConfigError

# The usage event and the end mark follow the last token.
_NUM_CLOSING_EVENTS = 2
_TAIL_BYTES = 4096  # the last events of a stream fit in it
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Answer:
    """One stream as seen by its client. If `error` is set the times are meaningless."""

    due: float  # when the request was due
    event_times: tuple[float, ...] = ()  # of each event with tokens
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """Address and model of a server."""

    host: str
    port: int
    model: str
    api_key: str | None = None

    @classmethod
    def of(cls, url: str, model: str, api_key: str | None = None) -> Target:
        """Raises ConfigError for anything but http://host:port."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"{url!r} is not of the form http://host:port")
        return cls(parts.hostname, parts.port or 80, model, api_key)

    def completion(self, prompt: Sequence[int], num_new_tokens: int, **more: Any) -> bytes:
        """The bytes of a request for exactly `num_new_tokens`, greedy, streamed, with usage."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": num_new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        payload = json.dumps(body, separators=(",", ":")).encode()
        lines = [
            "POST /v1/completions HTTP/1.1",
            f"Host: {self.host}:{self.port}",
            "Content-Type: application/json",
            f"Content-Length: {len(payload)}",
            "Connection: close",  # otherwise an error answer, which has no end mark, would keep the connection open
        ]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + payload


class _Stream(asyncio.Protocol):
    """One POST on one connection, whose answer is server-sent events in HTTP chunks."""

    def __init__(self, request: bytes, due: float) -> None:
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._request = request
        self._due = due
        self._times: list[float] = []
        self._head = b""
        self._tail = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        # An event ends with an empty line, which may come in two pieces. HTTP's own lines end with
        # \r\n.
        num_events = data.count(b"\n\n") + (self._tail[-1:] == b"\n" and data[:1] == b"\n")
        if num_events:
            self._times += [time.perf_counter()] * num_events
        if len(self._head) < _TAIL_BYTES:
            self._head += data[:_TAIL_BYTES]
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._tail.endswith(b"0\r\n\r\n") and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(self._answer(exc))

    def _answer(self, exc: Exception | None) -> Answer:
        usage = _USAGE.findall(self._tail)
        whole = self._head.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in self._tail[-200:]
        if exc is not None or not whole or not usage:
            return Answer(
                self._due, error=f"{exc or 'not a whole stream'}: {self._head[:400]!r} ... {self._tail[-200:]!r}"
            )
        return Answer(self._due, tuple(self._times[:-_NUM_CLOSING_EVENTS]), int(usage[-1]))


async def complete(target: Target, request: bytes, due: float | None = None) -> Answer:
    """Send one request and read its whole answer. Never raises: a failure is an answer with an error."""
    due = time.perf_counter() if due is None else due
    loop = asyncio.get_running_loop()
    try:
        _, stream = await loop.create_connection(lambda: _Stream(request, due), target.host, target.port)
    except OSError as error:
        return Answer(due, error=f"no connection to {target.host}:{target.port}: {error}")
    return await stream.done


async def closed_loop(
    send: Callable[[bytes], Awaitable[Answer]], requests: Iterable[bytes], concurrency: int
) -> list[Answer]:
    """Keep `concurrency` requests running: each that ends starts the next."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def client() -> None:
        for request in waiting:
            answers.append(await send(request))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


async def open_loop(
    send: Callable[[bytes, float], Awaitable[Answer]], requests: Sequence[bytes], offsets_s: Sequence[float]
) -> list[Answer]:
    """Send each request at its own time; a late start counts as the server's time."""
    begin = time.perf_counter()

    async def client(request: bytes, due: float) -> Answer:
        await asyncio.sleep(due - time.perf_counter())
        return await send(request, due)

    pairs = zip(requests, offsets_s, strict=True)
    return list(await asyncio.gather(*(client(request, begin + offset) for request, offset in pairs)))
