"""A decode plan of 256 sequences from an engine to two rank processes, and one rank's answer, by the step
channel.

Beside it the same by pickle over `multiprocessing.connection`, by a Ray actor call and by a Ray compiled graph.
Time starts when the engine has the plan as arrays. `one way` ends when a rank has it as arrays; clocks of
processes on one machine agree. `to both` ends when the later rank has it, `half round trip` when the engine has
rank 0's answer. The ranks synchronize before that answer, as collectives do. Steps follow each other at once,
or after a pause as long as a GPU step, in which cores sleep. There is one process more than the two cores.
Goal: 30 us one way, at once.

    python -m benchmarks.step_channel [--rounds 5] [--steps 500] [--without-ray]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.report import Report
from shoal.replicas.channel.step_channel import StepChannelClient, StepChannelServer
from shoal.replicas.channel.step_frames import decode, encode
from shoal.replicas.channel.step_sockets import Address
from shoal.replicas.plan import DEVICE_TOKEN, StepPlan, StepResult

NUM_SEQUENCES = 256
WORLD_SIZE = 2
NUM_WARM = 50  # steps at the beginning of a round that are not counted
PAUSES_MS = (0.0, 2.0)
SETTLE_S = 4.0  # Ray's processes take a while to end, and would disturb the next round
GOAL_US = 30.0
STEP_CHANNELS = ("UNIX socket", "TCP")

Stamps = list[int]  # perf_counter_ns at each plan's arrival
_PROCESSES = multiprocessing.get_context("spawn")


class Way(Protocol):
    """How plans reach the ranks."""

    def step(self, plan: StepPlan) -> None:
        """Send the plan to both ranks and wait for rank 0's answer."""
        ...

    def stop(self) -> list[Stamps]:
        """End the ranks; returns the stamps of each."""
        ...


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, plan.sample_rows)


class Meeting:
    """Rank 0 waits here for the others in every step."""

    def __init__(self, path: str, rank: int) -> None:
        self._fifo, self._rank = os.open(path, os.O_RDWR), rank

    def come(self) -> None:
        if self._rank:
            os.write(self._fifo, b".")
        else:
            for _ in range(WORLD_SIZE - 1):
                os.read(self._fifo, 1)


class ByChannel:
    """The step channel."""

    def __init__(self, fifo: str, *, tcp: bool) -> None:
        token = secrets.token_bytes(32)
        self._server = StepChannelServer(WORLD_SIZE, token, host="127.0.0.1" if tcp else None)
        address = self._server.address or self._server.path
        self._ranks = Ranks(lambda rank: (channel_rank, (fifo, address, rank, token)))
        self._server.accept(60)

    def step(self, plan: StepPlan) -> None:
        self._server.submit(plan)
        self._server.result()

    def stop(self) -> list[Stamps]:
        self._server.close()
        return self._ranks.join()


def channel_rank(stamps_to: Connection, fifo: str, address: Address, rank: int, token: bytes) -> None:
    client, meeting, stamps = StepChannelClient(address, rank, WORLD_SIZE, token), Meeting(fifo, rank), []
    while (plan := client.receive()) is not None:
        stamps.append(perf_counter_ns())
        meeting.come()
        if rank == 0:
            client.send_result(answer(plan))
    stamps_to.send(stamps)


class ByPickle:
    """`multiprocessing.connection`, which pickles."""

    def __init__(self, fifo: str) -> None:
        pipes = [_PROCESSES.Pipe() for _ in range(WORLD_SIZE)]
        self._pipes = [ours for ours, _ in pipes]
        self._ranks = Ranks(lambda rank: (pickle_rank, (fifo, pipes[rank][1], rank)))

    def step(self, plan: StepPlan) -> None:
        for pipe in self._pipes:
            pipe.send(plan)
        self._pipes[0].recv()

    def stop(self) -> list[Stamps]:
        for pipe in self._pipes:
            pipe.send(None)
        return self._ranks.join()


def pickle_rank(stamps_to: Connection, fifo: str, pipe: Connection, rank: int) -> None:
    meeting, stamps = Meeting(fifo, rank), []
    while (plan := pipe.recv()) is not None:
        stamps.append(perf_counter_ns())
        meeting.come()
        if rank == 0:
            pipe.send(answer(plan))
    stamps_to.send(stamps)


class Ranks:
    """Rank processes that return their stamps when they end."""

    def __init__(self, target: Callable[[int], tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self._processes, self._stamps = [], []
        for rank in range(WORLD_SIZE):
            function, arguments = target(rank)
            ours, theirs = _PROCESSES.Pipe(duplex=False)
            process = _PROCESSES.Process(target=function, args=(theirs, *arguments), daemon=True)
            process.start()
            self._processes.append(process)
            self._stamps.append(ours)

    def join(self) -> list[Stamps]:
        stamps = [pipe.recv() for pipe in self._stamps]
        for process in self._processes:
            process.join()
        return stamps


class RayRank:
    """What an actor runs."""

    def __init__(self, fifo: str, rank: int) -> None:
        self._meeting = Meeting(fifo, rank)
        self._stamps: Stamps = []

    def run(self, plan: StepPlan) -> StepResult:
        self._stamps.append(perf_counter_ns())
        self._meeting.come()
        return answer(plan)

    def stamps(self) -> Stamps:
        return self._stamps


class ByActorCall:
    """A method call on each of two actors."""

    def __init__(self, fifo: str) -> None:
        import ray

        from benchmarks.actor_calls import ActorCalls  # here: Ray reads the environment when it is imported

        self._get = ray.get
        actor: Any = ray.remote(RayRank)
        self._actors: list[Any] = [actor.remote(fifo, rank) for rank in range(WORLD_SIZE)]
        self._calls = ActorCalls(self._actors)

    def step(self, plan: StepPlan) -> None:
        self._calls.submit(plan)
        self._calls.result()

    def stop(self) -> list[Stamps]:
        return self._get([actor.stamps.remote() for actor in self._actors])


class ByCompiledGraph(ByActorCall):
    """The same two calls as a compiled graph."""

    def __init__(self, fifo: str) -> None:
        super().__init__(fifo)
        from ray.dag import InputNode, MultiOutputNode

        with InputNode() as plan:
            outputs = MultiOutputNode([actor.run.bind(plan) for actor in self._actors])
        self._graph = outputs.experimental_compile()

    def step(self, plan: StepPlan) -> None:
        self._get(self._graph.execute(plan))

    def stop(self) -> list[Stamps]:
        self._graph.teardown()
        return super().stop()


@contextmanager
def local_ray() -> Iterator[None]:
    """A Ray cluster in a folder of its own, shut down at the end."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    folder = tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp")
    try:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(SETTLE_S)


def decode_plan() -> StepPlan:
    rows = np.arange(NUM_SEQUENCES, dtype=np.int32)
    new = rows[: NUM_SEQUENCES // 16]  # every 16th sequence begins a block
    ones = np.ones_like(rows)
    return StepPlan(0, rows, rows * 7, ones, np.full_like(rows, DEVICE_TOKEN), rows, rows, new, new, new)


class Times(NamedTuple):
    """Microseconds of a round's steps; `one_way` has those of all ranks."""

    one_way: list[float]
    to_both: list[float]
    half: list[float]


def measure(make: Callable[[str], Way], num_steps: int, pause_ms: float) -> Times:
    """One round. make: receives the path of the ranks' FIFO."""
    begins, ends = [], []
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        fifo = str(Path(folder, "meeting"))
        os.mkfifo(fifo)
        way, plan = make(fifo), decode_plan()
        for step in range(NUM_WARM + num_steps):
            plan = plan._replace(step=step)
            begins.append(perf_counter_ns())
            way.step(plan)
            ends.append(perf_counter_ns())
            if pause_ms:
                time.sleep(pause_ms / 1e3)
        stamps = way.stop()
    one_way = [[(stamp - begin) / 1e3 for stamp, begin in zip(of_rank, begins, strict=True)] for of_rank in stamps]
    half = [(end - begin) / 2e3 for end, begin in zip(ends, begins, strict=True)]
    counted = [of_rank[NUM_WARM:] for of_rank in one_way]
    return Times([us for of_rank in counted for us in of_rank], list(map(max, *counted)), half[NUM_WARM:])


def time_codec() -> dict[str, float]:
    """Time of encoding and decoding alone."""
    plan = decode_plan()
    frame = bytearray(encode(plan))
    figures = {"bytes of a plan": float(len(frame))}
    for what, function in (("encode us", lambda: encode(plan)), ("decode us", lambda: decode(frame))):
        times = []
        for _ in range(5000):
            begin = perf_counter_ns()
            function()
            times.append((perf_counter_ns() - begin) / 1e3)
        figures[what] = round(median(times), 2)
    return figures


def p99(times: list[float]) -> float:
    return quantiles(times, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500, help="counted steps of a round")
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args()
    ways: dict[str, Callable[[str], Way]] = {
        "UNIX socket": lambda fifo: ByChannel(fifo, tcp=False),
        "TCP": lambda fifo: ByChannel(fifo, tcp=True),
        "pickled pipe": ByPickle,
    }
    ray_ways: dict[str, Callable[[str], Way]] = {"Ray compiled graph": ByCompiledGraph, "Ray actor call": ByActorCall}
    rounds: dict[tuple[str, float], list[Times]] = {}

    def one_round(of: dict[str, Callable[[str], Way]]) -> None:
        for name, make in of.items():
            for pause_ms in PAUSES_MS:
                rounds.setdefault((name, pause_ms), []).append(measure(make, options.steps, pause_ms))

    for number in range(1 + options.rounds):  # the first is not counted
        one_round(ways)
        if not options.without_ray:
            with local_ray():
                one_round(ray_ways)
        print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
    report = Report("step_channel", settings={"sequences": NUM_SEQUENCES, "ranks": WORLD_SIZE, **vars(options)})
    for (name, pause_ms), all_rounds in rounds.items():
        one_way, to_both, half = zip(*all_rounds[1:], strict=True)
        figures = {
            "pause ms": pause_ms,
            "one way p50 us": median(map(median, one_way)),
            "one way p99 us": median(map(p99, one_way)),
            "to both p50 us": median(map(median, to_both)),
            "half round trip p50 us": median(map(median, half)),
            "goal us": GOAL_US if name in STEP_CHANNELS and not pause_ms else None,
        }
        report.add(
            way=name, **{what: round(value, 1) if value is not None else None for what, value in figures.items()}
        )
    report.trace = time_codec()
    report.show()
    report.write()


if __name__ == "__main__":
    main()
