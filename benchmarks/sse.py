"""Streams over HTTP: what ingress and router keep of what bare uvicorn can send, and the CPU time they take.

A fake engine makes one token for each of 64 streams every 20 ms. Ways, by turns in one run, same client for all:
  bare     uvicorn alone; its application sends, at the same pace, the very bytes that ingress sent for one stream
  router   the product's HTTP application and Router under uvicorn -> TCP -> replica server
  serve    the same as Ray Serve runs it: proxy -> ingress deployment -> TCP -> replica server
tok/s is over the time from a round's first event to its last; `kept` divides by that of bare, and by nothing ideal.
`tok/s per core` divides by the CPU time of the processes between engine and client: for serve that is all that Ray
started, for router the ingress process, for bare its own. The fake engine's process and the client count nowhere.

    python -m benchmarks.sse [--streams 64] [--pace-ms 20] [--tokens 250] [--rounds 3] [--no-serve]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send

from benchmarks.load import cpu_seconds, post, stream, stream_many
from benchmarks.report import ROOT, Report
from shoal.cluster.handshake import new_secret
from shoal.cluster.membership import ReplicaInfo, StaticMembership
from shoal.cluster.router import Router
from shoal.deploy.http_app import create_http_app
from shoal.deploy.service import ApiService, ServedModel
from shoal.replicas.tokenizer import Tokenizer
from tests.support.fake_replica import FakeReplica

HOST = "127.0.0.1"
MODEL_ID = "fake"
PATH = "/v1/completions"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Way:
    """A server under measurement. `pids` are the processes whose CPU time counts."""

    name: str
    port: int
    pids: Callable[[], Sequence[int]]


def listening_socket() -> socket.socket:
    """Made in the parent, so that the port is known and connections wait until the child accepts them."""
    sock = socket.socket()
    sock.bind((HOST, 0))
    sock.listen(1024)
    return sock


def run_uvicorn(app: Any, sock: socket.socket, lifespan: Any = "off") -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan=lifespan)
    uvicorn.Server(config).run(sockets=[sock])


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[int]:
    """A spawned process; yields its pid and ends it."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.terminate()
        process.join(10)


# The engine's side


def serve_fake(secret: bytes, pace: float, num_streams: int, parent: Connection) -> None:
    async def run() -> None:
        replica = FakeReplica(secret, model_id=MODEL_ID, interval=pace, max_num_seqs=num_streams)
        parent.send(await replica.start())
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def fake_replica(secret: bytes, pace: float, num_streams: int) -> Iterator[ReplicaInfo]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    with child(serve_fake, secret, pace, num_streams, theirs):
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError(f"the fake replica did not start within {START_TIMEOUT_S:.0f} s")
        yield ours.recv()


# Way 1: bare uvicorn


class BareApp:
    """Sends the given events, one each tick; all streams share the tick, as the sequences of one engine step do."""

    def __init__(self, events: list[bytes], pace: float) -> None:
        self._events = events
        self._pace = pace
        self._tick: asyncio.Event | None = None
        self._ticker: asyncio.Task[None] | None = None

    async def _run_ticker(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += self._pace
            await asyncio.sleep(max(due - loop.time(), 0.0))
            tick, self._tick = self._tick, asyncio.Event()
            if tick is not None:
                tick.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._ticker is None:
            self._tick = asyncio.Event()
            self._ticker = asyncio.create_task(self._run_ticker())
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in self._events:
            assert self._tick is not None
            await self._tick.wait()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def serve_bare(events: list[bytes], pace: float, sock: socket.socket) -> None:
    run_uvicorn(BareApp(events, pace), sock)


# Way 2: ingress and router under uvicorn


def serve_ingress(info: ReplicaInfo, secret: bytes, tokenizer: Path, sock: socket.socket) -> None:
    router = Router(StaticMembership([info]), secret)
    model = ServedModel(MODEL_ID, Tokenizer.from_folder(tokenizer), str(tokenizer))
    run_uvicorn(create_http_app(ApiService(router, [model]), on_start=router.start), sock, lifespan="on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "deploy" / "models" / "tiny")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--pace-ms", type=float, default=20.0, help="between two tokens of a stream")
    parser.add_argument("--tokens", type=int, default=250, help="of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    pace = arguments.pace_ms / 1e3
    body = {"model": MODEL_ID, "prompt": [5, 6, 7, 8], "max_tokens": arguments.tokens, "stream": True, "seed": 0}
    requests = [post(PATH, body | {"seed": seed}) for seed in range(arguments.streams)]

    with ExitStack() as stack:
        secret = new_secret()
        info = stack.enter_context(fake_replica(secret, pace, arguments.streams))
        sock = listening_socket()
        ingress = stack.enter_context(child(serve_ingress, info, secret, arguments.tokenizer, sock))
        ways = [Way("router", sock.getsockname()[1], lambda: [ingress])]
        events = asyncio.run(stream(HOST, ways[0].port, requests[0])).events()
        # What follows the last token (the end mark) goes with it, as nothing paces it.
        events = [*events[: arguments.tokens - 1], b"".join(events[arguments.tokens - 1 :])]
        sock = listening_socket()
        bare = stack.enter_context(child(serve_bare, events, pace, sock))
        ways.insert(0, Way("bare", sock.getsockname()[1], lambda: [bare]))
        rounds = [[run_round(way, requests, arguments.tokens) for way in ways] for _ in range(arguments.rounds + 1)][1:]

    report = Report("sse", settings=vars(arguments) | {"tokenizer": str(arguments.tokenizer)})
    for row in rows(ways, rounds):
        report.add(**row)
    report.show()
    report.write()


@dataclass(frozen=True)
class Round:
    tokens_per_second: float
    tokens_per_cpu_second: float
    num_events: int


def run_round(way: Way, requests: list[bytes], num_tokens: int) -> Round:
    """All streams at once, from the first event of any to the last of any."""
    pids = way.pids()
    before = cpu_seconds(pids)
    times = asyncio.run(stream_many(HOST, way.port, requests))
    used = cpu_seconds(pids) - before
    elapsed = max(t.last for t in times) - min(t.first for t in times)
    return Round(
        (num_tokens - 1) * len(requests) / elapsed, num_tokens * len(requests) / used, sum(t.num_events for t in times)
    )


def rows(ways: list[Way], rounds: list[list[Round]]) -> Iterator[dict[str, Any]]:
    for column, way in enumerate(ways):
        results = [row[column] for row in rounds]
        yield {
            "way": way.name,
            "tok/s": median(r.tokens_per_second for r in results),
            "kept": median(
                r.tokens_per_second / row[0].tokens_per_second for r, row in zip(results, rounds, strict=True)
            ),
            "tok/s per core": median(r.tokens_per_cpu_second for r in results),
            "events": median(r.num_events for r in results) / median(row[0].num_events for row in rounds),
        }


if __name__ == "__main__":
    main()
