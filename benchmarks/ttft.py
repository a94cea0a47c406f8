"""Time to first token of one stream: what router and replica, and then HTTP, add to the bare engine.

Three ways take turns, with the same prompts and one request at a time:
    engine   an engine in this process: from `add_request` to the step that returns the first token
    router   a Router here, the same engine behind a ReplicaServer in another process: from `generate` to the delta
    http     the whole application (`shoal serve`), a streamed completion: from the request to the first event
Prompts are random token ids, so that the prefix cache has no hits.

    python -m benchmarks.ttft [--model deploy/models/tiny] [--prompt-len 64] [--rounds 40] [--no-http]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles

from benchmarks.load import free_port, post, stream
from benchmarks.report import ROOT, Report
from shoal.cluster.replica.replica_server import ReplicaServer
from shoal.cluster.router.router import Router
from shoal.cluster.wire.membership import ReplicaInfo, StaticMembership
from shoal.replicas.channel.handshake import new_secret
from shoal.replicas.config import EngineConfig, ModelConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.engine.engine_thread import EngineThread
from shoal.replicas.offline import build_engine
from shoal.replicas.protocol import Request, SamplingParams

NUM_TOKENS = 4
SAMPLING = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
MODEL_ID = "model"
WARM_UP_ROUNDS = 3
START_TIMEOUT_S = 180.0

Prompt = tuple[int, ...]


def engine_ttft(engine: Engine, request: Request) -> float:
    """Seconds to the bare engine's first token; then runs the request to its end."""
    begin = time.perf_counter()
    first = 0.0
    engine.add_request(request)
    while engine.has_work:
        if any(delta.token_ids for delta in engine.step()) and not first:
            first = time.perf_counter()
    return first - begin


async def router_ttft(router: Router, request: Request) -> float:
    """Seconds to the first token through router, TCP and replica."""
    begin = time.perf_counter()
    first = 0.0
    async for deltas in router.generate(MODEL_ID, request):
        if any(delta.token_ids for delta in deltas) and not first:
            first = time.perf_counter()
    return first - begin


async def http_ttft(port: int, prompt: Prompt) -> float:
    """Seconds to the first event of a streamed completion."""
    body = {"prompt": list(prompt), "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    times = (await stream("127.0.0.1", port, post("/v1/completions", body))).done.result()
    return times.first - times.sent


def serve_replica(model: Path, secret: bytes, parent: Connection) -> None:
    """A replica without Ray: engine, thread and server. Sends its ReplicaInfo; ends when the parent closes the pipe."""

    async def run() -> None:
        engine = build_engine(EngineConfig(ModelConfig(str(model))))
        server = ReplicaServer(ReplicaInfo("replica", MODEL_ID, "127.0.0.1", 0), secret)
        thread = EngineThread(engine, server.publish, server.fail)
        thread.start()
        parent.send(await server.start(thread))
        try:
            await asyncio.to_thread(parent.poll, None)
        finally:
            await server.close()
            thread.stop()

    asyncio.run(run())


@contextmanager
def replica_process(model: Path, secret: bytes) -> Iterator[ReplicaInfo]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_replica, args=(model, secret, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT_S):
            raise RuntimeError(f"the replica did not start within {START_TIMEOUT_S:.0f} s")
        yield ours.recv()
    finally:
        ours.close()
        process.join(20)
        process.kill()


@contextmanager
def application(model: Path) -> Iterator[int]:
    """`shoal serve MODEL`, ready; yields its port and stops it as Ctrl-C would."""
    port = free_port()
    command = [sys.executable, "-m", "shoal.deploy.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`{' '.join(command)}` did not become ready")
            time.sleep(0.5)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


async def measure(
    engine: Engine, info: ReplicaInfo, secret: bytes, port: int | None, prompts: list[Prompt]
) -> dict[str, list[float]]:
    """Seconds of every way for every prompt after the warm-up prompts."""
    router = Router(StaticMembership([info]), secret)
    await router.start()
    times: dict[str, list[float]] = {"engine": [], "router": []} | ({"http": []} if port is not None else {})
    try:
        for number, prompt in enumerate(prompts):
            request = Request(str(number), prompt, SAMPLING)
            times["engine"].append(engine_ttft(engine, request))
            times["router"].append(await router_ttft(router, request))
            if port is not None:
                times["http"].append(await http_ttft(port, prompt))
    finally:
        await router.close()
    return {way: values[WARM_UP_ROUNDS:] for way, values in times.items()}


@contextmanager
def no_application(_: Path) -> Iterator[None]:
    yield None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "deploy" / "models" / "tiny")
    parser.add_argument("--prompt-len", type=int, default=64, help="tokens")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--http", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    engine = build_engine(EngineConfig(ModelConfig(str(arguments.model))))
    draw = random.Random(0)
    prompts = [
        tuple(draw.randrange(8, engine.facts.vocab_size) for _ in range(arguments.prompt_len))
        for _ in range(arguments.rounds + WARM_UP_ROUNDS)
    ]
    secret = new_secret()
    front = application if arguments.http else no_application
    try:
        with replica_process(arguments.model, secret) as info, front(arguments.model) as port:
            times = asyncio.run(measure(engine, info, secret, port, prompts))
    finally:
        engine.shutdown()

    report = Report("ttft", settings=vars(arguments) | {"model": str(arguments.model)})
    bare = median(times["engine"])
    for way, values in times.items():
        report.add(
            **{
                "way": way,
                "median ms": median(values) * 1e3,
                "p90 ms": quantiles(values, n=10)[-1] * 1e3,
                "added ms": (median(values) - bare) * 1e3,
                "ratio": median(values) / bare,
            }
        )
    report.show()
    report.write()


if __name__ == "__main__":
    main()
