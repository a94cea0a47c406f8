"""Streams over HTTP: throughput of ingress and router relative to bare uvicorn, and their CPU time.

A fake engine makes one token for each of 64 streams every 20 ms. Ways, in turn in one run, with the same client:
    bare     uvicorn alone; sends, at the same pace, the bytes that the ingress sent for one stream
    router   HTTP application and Router under uvicorn -> TCP -> replica server
    serve    `shoal serve`: Ray Serve's proxy -> ingress deployment -> TCP -> replica server
    haproxy  `shoal serve --host 0.0.0.0`: HAProxy instead of Serve's proxy
tok/s is from a round's first event to its last; `kept` divides it by that of bare.
`tok/s per core` divides by the CPU time of the processes between engine and client: all that Ray started, the ingress
process, or the bare one. The fake engine's process and the client do not count.

    python -m benchmarks.sse [--streams 64] [--pace-ms 20] [--tokens 250] [--rounds 3] [--no-serve]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any, cast

import uvicorn
from starlette.types import Receive, Scope, Send

from benchmarks.load import cpu_seconds, descendants, free_port, post, stream, stream_many
from benchmarks.report import ROOT, Report
from shoal.cluster.router.router import Router
from shoal.cluster.wire.membership import ReplicaInfo, StaticMembership
from shoal.deploy.environment import make_ray_folder, prepare_environment
from shoal.deploy.openai.api_state import ApiState, ServedModel
from shoal.deploy.openai.http_app import create_http_app
from shoal.replicas.channel.handshake import new_secret
from shoal.replicas.text.tokenizer import Tokenizer
from tests.support.fake_replica import FakeReplica

HOST = "127.0.0.1"
MODEL_ID = "fake"
PATH = "/v1/completions"
START_TIMEOUT_S = 120.0
STREAM_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Way:
    """A measured server. `pids` are the processes whose CPU time counts."""

    name: str
    port: int
    pids: Sequence[int]


@contextmanager
def child(target: Callable[..., None], *arguments: Any, stop: int = signal.SIGTERM) -> Iterator[BaseProcess]:
    """A spawned process, stopped with the signal `stop`."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            os.kill(pid_of(process), stop)
        process.join(60)
        process.kill()


def pid_of(process: BaseProcess) -> int:
    assert process.pid is not None, "it was started"
    return process.pid


@contextmanager
def way(name: str, probe: bytes, target: Callable[..., None], *arguments: Any) -> Iterator[Way]:
    """`target(port, *arguments)` in its own process, after it has answered `probe` with a whole stream."""
    port = free_port()
    # SIGINT stops it as Ctrl-C does, and so a Ray that it started.
    with child(target, port, *arguments, stop=signal.SIGINT) as process:
        wait_until_streaming(process, port, probe)
        pid = pid_of(process)
        # A process with children only drives them; its other work is the fake engine's.
        yield Way(name, port, descendants(pid) or [pid])


def wait_until_streaming(process: BaseProcess, port: int, probe: bytes) -> None:
    """Return after the first whole stream; at the timeout raise the last error."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            asyncio.run(asyncio.wait_for(stream(HOST, port, probe), STREAM_TIMEOUT_S))
        except (OSError, RuntimeError, TimeoutError):
            if time.monotonic() > deadline or not process.is_alive():
                raise
            time.sleep(0.5)
        else:
            return


def run_uvicorn(app: Any, port: int, start: Callable[[], Awaitable[None]] | None = None) -> None:
    """Serve `app` on uvicorn's own kind of event loop; `start` runs first, in the same loop."""
    config = uvicorn.Config(app, host=HOST, port=port, log_level="warning", access_log=False, lifespan="off")

    async def run() -> None:
        if start is not None:
            await start()
        await uvicorn.Server(config).serve()

    with suppress(KeyboardInterrupt), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


# Engine side


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
    """Sends the given events, one each tick; all streams share the tick, like sequences of one engine step."""

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


def serve_bare(port: int, events: list[bytes], pace: float) -> None:
    run_uvicorn(BareApp(events, pace), port)


# Way 2: HTTP application and router under uvicorn


def serve_ingress(port: int, info: ReplicaInfo, secret: bytes, tokenizer: Path) -> None:
    router = Router(StaticMembership([info]), secret)
    model = ServedModel(MODEL_ID, Tokenizer.from_folder(tokenizer), str(tokenizer))
    run_uvicorn(create_http_app(ApiState(router, [model])), port, router.start)


# Ways 3 and 4: the ingress deployment under Ray Serve


def serve_application(port: int, host: str, tokenizer: Path, pace: float, num_streams: int) -> None:
    """Ray, Serve with the product's Ingress, and a fake replica in this process, registered in the directory."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    prepare_environment(host)
    # Ray reads its environment at import.
    from ray import serve

    from shoal.cluster.wire.directory import REGISTER_INTERVAL, DirectoryClient
    from shoal.deploy.app import INGRESS, Ingress, IngressSettings
    from shoal.deploy.openai.auth import KeyRing
    from shoal.deploy.server.launcher import ray_cluster

    async def run_replica() -> None:
        directory = DirectoryClient()
        replica = FakeReplica(await directory.secret(), model_id=MODEL_ID, interval=pace, max_num_seqs=num_streams)
        await replica.start()
        while True:
            await directory.register(replica.info)
            await asyncio.sleep(REGISTER_INTERVAL)

    with ray_cluster(None, make_ray_folder()):
        serve.start(http_options={"host": host, "port": port})
        settings = IngressSettings(((MODEL_ID, str(tokenizer), tokenizer),), KeyRing.of([], [], local=True))
        options: dict[str, Any] = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
        deployment: Any = serve.deployment(cast("Any", Ingress), name=INGRESS, **options)
        serve.run(deployment.bind(settings), name="sse", route_prefix="/")
        with suppress(KeyboardInterrupt):  # the parent is done
            asyncio.run(run_replica())


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
        router = stack.enter_context(way("router", requests[0], serve_ingress, info, secret, arguments.tokenizer))
        events = asyncio.run(stream(HOST, router.port, requests[0])).events()
        # The end mark travels with the last token, as nothing paces it.
        events = [*events[: arguments.tokens - 1], b"".join(events[arguments.tokens - 1 :])]
        ways = [stack.enter_context(way("bare", requests[0], serve_bare, events, pace)), router]
        if arguments.serve:
            for name, host in (("serve", HOST), ("haproxy", "0.0.0.0")):
                settings = (host, arguments.tokenizer, pace, arguments.streams)
                ways.append(stack.enter_context(way(name, requests[0], serve_application, *settings)))
        rounds = [
            [run_round(server, requests, arguments.tokens) for server in ways] for _ in range(arguments.rounds + 1)
        ][1:]

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


def run_round(server: Way, requests: list[bytes], num_tokens: int) -> Round:
    """Run all streams at once; timed from the first event of any to the last of any."""
    before = cpu_seconds(server.pids)
    times = asyncio.run(stream_many(HOST, server.port, requests))
    used = cpu_seconds(server.pids) - before
    elapsed = max(t.last for t in times) - min(t.first for t in times)
    return Round(
        (num_tokens - 1) * len(requests) / elapsed, num_tokens * len(requests) / used, sum(t.num_events for t in times)
    )


def rows(ways: list[Way], rounds: list[list[Round]]) -> Iterator[dict[str, Any]]:
    for column, server in enumerate(ways):
        results = [row[column] for row in rounds]
        yield {
            "way": server.name,
            "tok/s": median(r.tokens_per_second for r in results),
            "kept": median(
                r.tokens_per_second / row[0].tokens_per_second for r, row in zip(results, rounds, strict=True)
            ),
            "tok/s per core": median(r.tokens_per_cpu_second for r in results),
            "events": median(r.num_events for r in results) / median(row[0].num_events for row in rounds),
        }


if __name__ == "__main__":
    main()
