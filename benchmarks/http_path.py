"""Token path from the engine to an HTTP client: the real engine on a simulated device.

A step takes 4 ms + 62.5 us for each decoding sequence (8 ms for 64, 20 ms for 256). The engine awaits its result
without the GIL, as it does a CUDA event. Prefill costs nothing: the host is measured. A round's streams start at once.
    router   HTTP application and Router under uvicorn -> TCP -> replica process
    serve    `shoal serve` on loopback: Ray Serve's proxy -> ingress deployment -> TCP -> replica
    haproxy  `shoal serve --host 0.0.0.0`: HAProxy instead of Serve's proxy
Columns: `of ideal` divides the rate by the device's. TTFT is the median stream's; ITL is between two reads of a client.
`cpu us/token` is by process. `host us` is the engine thread's work between two waits.
`late us` is the time from the end of a step until the thread has its result.

    python -m benchmarks.http_path [--streams 1 64 256] [--tokens 128] [--ways router serve haproxy] [--prompt text]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import numpy as np
import uvloop
from numpy.typing import NDArray

from benchmarks.load import StreamClient, cpu_seconds, descendants, post
from benchmarks.report import ROOT, Report
from benchmarks.sse import HOST, MODEL_ID, PATH, START_TIMEOUT_S, Way, child, pid_of, serve_ingress, way
from shoal.cluster.replica.replica_server import ReplicaServer
from shoal.cluster.wire.membership import ReplicaInfo
from shoal.deploy.environment import make_ray_folder, prepare_environment
from shoal.replicas.channel.handshake import new_secret
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts, SchedulerConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.engine.engine_thread import EngineThread
from shoal.replicas.plan import StepPlan, StepResult
from shoal.replicas.text.detokenizer import REPLACEMENT
from shoal.replicas.text.tokenizer import Tokenizer

TOKENIZER = ROOT / "deploy" / "models" / "tiny"
VOCAB_SIZE = 4096  # the tokenizer's
MAX_MODEL_LEN = 2048
FACTS = ModelFacts("Simulated", 32, 4096, 32, 8, 128, VOCAB_SIZE, MAX_MODEL_LEN, (0,), "bfloat16")
StepTimes = tuple[list[float], list[float]]  # microseconds of host work and of lateness, by step
TakeTimes = Callable[[], StepTimes]  # since the last call
STEP_S, STEP_S_PER_SEQUENCE = 4e-3, 62.5e-6


def step_seconds(num_sequences: int) -> float:
    return STEP_S + STEP_S_PER_SEQUENCE * num_sequences


def whole_tokens() -> NDArray[np.int32]:
    """Tokens of whole characters: of any other an event may have to wait for the next."""
    tokenizer = Tokenizer.from_folder(TOKENIZER)
    whole = [token for token in range(300, VOCAB_SIZE) if REPLACEMENT not in tokenizer.token_text(token)]
    return np.array(whole, np.int32)


class SimulatedExecutor:
    """A device that runs plans one after the other; the number of decodes sets the time of each."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.host_us: list[float] = []
        self.late_us: list[float] = []
        self._tokens = whole_tokens()
        self._ends: deque[tuple[StepPlan, float]] = deque()
        self._free_at = 0.0  # when the device has finished all submitted plans
        self._resumed_at = 0.0

    def submit(self, plan: StepPlan) -> None:
        num_decodes = int(np.count_nonzero(plan.num_tokens == 1))
        self._free_at = max(self._free_at, time.perf_counter()) + step_seconds(num_decodes)
        self._ends.append((plan, self._free_at))

    def result(self) -> StepResult:
        plan, end = self._ends.popleft()
        begin = time.perf_counter()
        if begin < end:
            time.sleep(end - begin)
        now = time.perf_counter()
        self.host_us.append((begin - self._resumed_at) * 1e6)
        self.late_us.append((now - end) * 1e6)
        self._resumed_at = now
        tokens = self._tokens[(plan.sample_rows * 31 + plan.step * 17) % len(self._tokens)]
        return StepResult(plan.step, tokens)

    def shutdown(self) -> None:
        self._ends.clear()

    def take_times(self) -> StepTimes:
        """The times since the last call."""
        times = self.host_us, self.late_us
        self.host_us, self.late_us = [], []
        return times


def build_engine(num_streams: int) -> tuple[Engine, SimulatedExecutor]:
    num_blocks = num_streams * MAX_MODEL_LEN // 64
    config = EngineConfig(
        ModelConfig("simulated"),
        CacheConfig(64, num_blocks),
        SchedulerConfig(num_streams, max_num_batched_tokens=num_streams * 1024),  # all waiting prompts in one step
    )
    executor = SimulatedExecutor(num_blocks)
    return Engine(config.resolve(FACTS, "cuda"), FACTS, executor), executor


def replica_info(engine: Engine) -> ReplicaInfo:
    """A replica's description of itself; the port is not known yet."""
    return ReplicaInfo(
        "simulated-0",
        MODEL_ID,
        HOST,
        0,
        epoch=random.getrandbits(32),
        max_model_len=MAX_MODEL_LEN,
        vocab_size=VOCAB_SIZE,
        num_blocks=engine.load().num_blocks,
        block_size=engine.load().block_size,
        max_num_seqs=engine.config.scheduler.max_num_seqs,
    )


async def start_replica(secret: bytes, num_streams: int, parent: Connection) -> ReplicaServer:
    """Engine, thread and server in this process; a thread sends the engine's times to `parent`."""
    engine, executor = build_engine(num_streams)
    server = ReplicaServer(replica_info(engine), secret)
    thread = EngineThread(engine, server.publish, server.fail)
    await server.start(thread)
    thread.start()

    def answer() -> None:
        with suppress(EOFError, OSError):
            while True:
                parent.recv()
                parent.send(executor.take_times())

    threading.Thread(target=answer, daemon=True).start()
    return server


def serve_replica(secret: bytes, num_streams: int, info: Connection, parent: Connection) -> None:
    async def run() -> None:
        server = await start_replica(secret, num_streams, parent)
        info.send(server.info)
        await asyncio.Event().wait()

    uvloop.run(run())


def serve_application(port: int, host: str, num_streams: int, parent: Connection) -> None:
    """Ray, Serve with the product's Ingress, and the replica in this process, registered in the directory."""
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
        server = await start_replica(await directory.secret(), num_streams, parent)
        while True:
            await directory.register(server.info)
            await asyncio.sleep(REGISTER_INTERVAL)

    with ray_cluster(None, make_ray_folder()):
        serve.start(http_options={"host": host, "port": port})
        settings = IngressSettings(((MODEL_ID, str(TOKENIZER), TOKENIZER),), KeyRing.of([], [], local=True))
        options: dict[str, Any] = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 0}}
        deployment: Any = serve.deployment(cast("Any", Ingress), name=INGRESS, **options)
        serve.run(deployment.bind(settings), name="http-path", route_prefix="/")
        with suppress(KeyboardInterrupt):  # the parent is done
            uvloop.run(run_replica())


# The client's side


class TimedClient(StreamClient):
    """Records the time of each read that ends an event; sends its request on demand."""

    def __init__(self, request: bytes) -> None:
        super().__init__(b"")
        self.times: list[float] = []
        self._body = request
        self.sent = 0.0

    def send(self) -> None:
        assert self._transport is not None, "it is connected"
        self.sent = time.perf_counter()
        self._transport.write(self._body)

    def data_received(self, data: bytes) -> None:
        if data.endswith(b"\n\n") or b"\n\n\r\n" in data:
            self.times.append(time.perf_counter())
        super().data_received(data)


async def run_streams(port: int, requests: Sequence[bytes]) -> list[TimedClient]:
    loop = asyncio.get_running_loop()
    clients: list[TimedClient] = []
    for request in requests:
        _, client = await loop.create_connection(lambda request=request: TimedClient(request), HOST, port)
        clients.append(client)
    for client in clients:
        client.send()
    await asyncio.gather(*(client.done for client in clients))
    return clients


def make_requests(num_streams: int, num_tokens: int, prompt: str) -> list[bytes]:
    draw, tokenizer = random.Random(time.time_ns()), Tokenizer.from_folder(TOKENIZER)
    requests = []
    for seed in range(num_streams):
        tokens: Any = draw.choices(range(300, VOCAB_SIZE), k=512)
        content = tokenizer.decode(tokens, skip_special_tokens=True) if prompt == "text" else tokens
        body = {"model": MODEL_ID, "prompt": content, "max_tokens": num_tokens, "stream": True, "seed": seed}
        requests.append(post(PATH, body | {"ignore_eos": True}))
    return requests


def process_kind(pid: int) -> str:
    with suppress(FileNotFoundError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        marks = {"ProxyActor": "proxy", "Ingress": "ingress", "haproxy": "haproxy", "multiprocessing.spawn": "ingress"}
        return next((kind for mark, kind in marks.items() if mark in command), "other")
    return "other"


def run_round(server: Way, take_times: TakeTimes, requests: list[bytes], num_tokens: int) -> dict[str, Any]:
    take_times()
    pids: dict[str, list[int]] = {"engine": [server.pids[0]]}
    for pid in server.pids[1:]:
        pids.setdefault(process_kind(pid), []).append(pid)
    before = {kind: cpu_seconds(members) for kind, members in pids.items()}
    clients = uvloop.run(run_streams(server.port, requests))
    used = {kind: cpu_seconds(members) - before[kind] for kind, members in pids.items()}
    host_us, late_us = take_times()
    firsts = [client.times[0] for client in clients]
    elapsed = max(client.times[-1] for client in clients) - min(firsts)
    total = num_tokens * len(requests)
    gaps = np.concatenate([np.diff(client.times) for client in clients]) * 1e3
    return {
        "tok/s": (total - len(requests)) / elapsed,
        "of ideal": (total - len(requests)) / elapsed * step_seconds(len(requests)) / len(requests),
        "ttft ms": float(np.median([client.times[0] - client.sent for client in clients])) * 1e3,
        "itl p50": float(np.median(gaps)),
        "itl p99": float(np.percentile(gaps, 99)),
        "itl max": float(gaps.max()),
        "cpu us/token": ", ".join(f"{kind} {seconds / total * 1e6:.0f}" for kind, seconds in used.items()),
        "host us p50": float(np.median(host_us[1:])),
        "host us p99": float(np.percentile(host_us[1:], 99)),
        "late us p50": float(np.median(late_us)),
        "late us p99": float(np.percentile(late_us, 99)),
    }


@contextmanager
def started(name: str, num_streams: int) -> Iterator[tuple[Way, TakeTimes]]:
    """A way with its replica; the first pid is the replica's."""
    ours, theirs = multiprocessing.Pipe()
    [probe] = make_requests(1, 2, "ids")

    def take_times() -> StepTimes:
        ours.send(None)
        return ours.recv()

    with ExitStack() as stack:
        if name == "router":
            secret, (info_here, info_there) = new_secret(), multiprocessing.Pipe()
            replica = stack.enter_context(child(serve_replica, secret, num_streams, info_there, theirs))
            if not info_here.poll(START_TIMEOUT_S):
                raise RuntimeError(f"the replica did not start within {START_TIMEOUT_S:.0f} s")
            server = stack.enter_context(way(name, probe, serve_ingress, info_here.recv(), secret, TOKENIZER))
            yield Way(name, server.port, [pid_of(replica), *server.pids]), take_times
        else:
            host = HOST if name == "serve" else "0.0.0.0"
            server = stack.enter_context(way(name, probe, serve_application, host, num_streams, theirs))
            [driver] = [pid for pid in descendants(os.getpid()) if server.pids[0] in descendants(pid)][:1]
            yield Way(name, server.port, [driver, *server.pids]), take_times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--ways", nargs="+", default=["router", "serve", "haproxy"])
    parser.add_argument("--prompt", choices=["ids", "text"], default="ids")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="where to write the report")
    arguments = parser.parse_args()
    report = Report("http_path", settings={key: value for key, value in vars(arguments).items() if key != "json"})
    for name in arguments.ways:
        with started(name, max(arguments.streams)) as (server, take_times):
            for num_streams in arguments.streams:
                rounds = []
                for _ in range(arguments.rounds + 1):
                    requests = make_requests(num_streams, arguments.tokens, arguments.prompt)
                    rounds.append(run_round(server, take_times, requests, arguments.tokens))
                middle = sorted(rounds[1:], key=lambda row: row["tok/s"])[arguments.rounds // 2]
                report.add(way=name, streams=num_streams, **middle)
    report.show()
    report.write(arguments.json)


if __name__ == "__main__":
    main()
