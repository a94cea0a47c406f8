"""Shoal and vLLM on the same GPUs in one run, in turn: same random weights' shapes, prompts and lengths.

    python -m benchmarks.vs_vllm 8b|1b|http|8b-tp2|70b-half-tp2|70b-tp4 [--out FOLDER] [--budget-s S]
        [--commit C] [--peer-path PATH]

Both stay loaded, with equal KV cache memory on each GPU, no prefix cache, at most 256 sequences and 16,384 tokens.
    8b, 1b          engines in worker processes on one GPU
    8b-tp2, 70b-tp4 the same on two and four GPUs (tensor parallel)
    70b-half-tp2    on two GPUs, the per-GPU GEMMs and attention of 70b-tp4; its all-reduces join two ranks
    http            two servers of the 8B shape
A ratio above 1 means that Shoal is faster. The report is written after every measurement, so that an interrupted run
keeps its results. A second turn that does not fit the budget is left out.
Trial run on a CPU: `python -m benchmarks.vs_vllm tiny --peer-engine shoal`, or tiny-tp2.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.alternate import OURS, PEER, Decode, Goals, Http, Offline, Row, alternate
from benchmarks.load import free_port
from benchmarks.report import RESULTS, Report, device_name
from benchmarks.subjects import (
    VLLM_VARIABLES,
    Python,
    Worker,
    lacking_gpus,
    say,
    shoal_arguments,
    started_server,
    started_worker,
    unwind_when_terminated,
    vllm_arguments,
    wait_for_all,
)
from shoal.deploy.bench import serving
from shoal.deploy.bench.http_client import Target
from shoal.deploy.bench.latency import NUM_DECODED
from shoal.deploy.bench.limits import Dense
from shoal.deploy.bench.shapes import open_model
from shoal.deploy.bench.workload import Workload, fixed_lengths, mixed_lengths
from shoal.replicas.device import choose_device
from shoal.replicas.models.checkpoint import read_model_facts

MODEL_ID = "model"
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Group:
    """One run of one model. `goals`: floor and aim of a ratio."""

    model: str
    kv_cache_memory_bytes: int  # for each engine, on each GPU
    budget_s: float
    goals: Goals
    decode: Sequence[tuple[int, int]] = ()  # batch, context
    num_decoded: int = NUM_DECODED
    offline: tuple[int, int, int] | None = None  # requests, shortest, longest
    http: Sequence[tuple[int, int]] = ()  # concurrency, requests
    http_shape: serving.Shape = field(default_factory=serving.Shape)
    settings: Mapping[str, Any] = field(default_factory=lambda: {"max_model_len": 16_384, "max_num_seqs": 256})
    tp: int = 1


# Rows of models that span GPUs.
SPLIT: dict[str, Any] = {
    "decode": ((1, 1024), (32, 1024), (128, 1024), (256, 1024)),
    "offline": (1000, 100, 1024),
    "goals": {f"decode B={batch} @1024": (1.0, 1.2) for batch in (1, 32, 128, 256)}
    | {"offline throughput": (1.0, 1.2)},
}
GROUPS = {
    "8b": Group(
        "8b",
        44 << 30,
        budget_s=470,
        decode=((1, 1024), (32, 1024), (128, 1024), (1, 8192), (8, 8192), (256, 1024), (32, 8192)),
        offline=(1000, 100, 1024),
        goals={
            "decode B=1 @1024": (1.1, 1.2),
            "decode B=32 @1024": (1.0, 1.2),
            "decode B=128 @1024": (1.0, 1.2),
            "decode B=256 @1024": (1.0, 1.2),
            "decode B=1 @8192": (1.0, 1.15),
            "decode B=8 @8192": (1.0, 1.15),
            "decode B=32 @8192": (1.0, 1.15),
            "prefill B=32 @1024": (0.9, 1.0),
            "prefill B=8 @8192": (0.9, 1.0),
            "offline throughput": (1.0, 1.2),
        },
    ),
    "1b": Group(
        "1b",
        24 << 30,
        budget_s=190,
        decode=((1, 1024), (32, 1024), (256, 1024)),
        offline=(1000, 100, 1024),
        goals={
            "decode B=1 @1024": (1.8, 2.8),
            "decode B=32 @1024": (1.5, 2.2),
            "decode B=256 @1024": (1.2, 1.6),
            "offline throughput": (1.4, 2.0),
        },
    ),
    "http": Group(
        "8b",
        44 << 30,
        budget_s=310,
        http=((1, 32), (64, 256), (256, 1024)),
        http_shape=serving.Shape(512, 128, 120_000),
        goals={
            "c=1 output tok/s": (1.0, 1.2),
            "c=64 output tok/s": (1.0, 1.2),
            "c=256 output tok/s": (1.0, 1.2),
            "c=1 TTFT p50": (1.0, 1.3),
            "c=64 TPOT p50": (1.0, 1.3),
            "c=64 ITL p99": (1.0, 1.3),
        },
    ),
    "8b-tp2": Group("8b", 40 << 30, budget_s=300, tp=2, **SPLIT),
    # Two copies of the weights take 33 GiB each on each GPU.
    "70b-half-tp2": Group("70b-half", 26 << 30, budget_s=420, tp=2, **SPLIT),
    "70b-tp4": Group("70b", 26 << 30, budget_s=420, tp=4, **SPLIT),
    # Trial runs on a CPU.
    "tiny": Group(
        "tiny",
        1 << 28,
        budget_s=60,
        decode=((1, 32), (2, 32)),
        num_decoded=4,
        offline=(6, 4, 16),
        goals={"decode B=1 @32": (0.1, 1.0)},
        settings={"max_model_len": 512, "max_num_seqs": 8},
    ),
    "tiny-tp2": Group(
        "tiny",
        1 << 26,
        budget_s=90,
        decode=((2, 32),),
        num_decoded=4,
        offline=(4, 4, 16),
        goals={"decode B=2 @32": (0.1, 1.0)},
        settings={"max_model_len": 512, "max_num_seqs": 8, "num_threads": 1},
        tp=2,
    ),
    "tiny-http": Group(
        "tiny",
        1 << 28,
        budget_s=120,
        http=((1, 2), (4, 8)),
        http_shape=serving.Shape(16, 4, 1000),
        goals={"c=1 output tok/s": (0.1, 1.0)},
        settings={"max_model_len": 512, "max_num_seqs": 8},
    ),
}


@dataclass(frozen=True)
class Run:
    """Output location and peer of a run."""

    group: Group
    report: Report
    out: Path
    peer_engine: str
    peer_python: Python
    shoal_args: list[str]
    begin: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        return self.begin + self.group.budget_s

    def log(self, name: str) -> Path:
        return self.out / f"{self.report.benchmark}_{name}.log"

    def keep(self, rows: Sequence[Row[Any]]) -> None:
        self.report.rows = [figure.row(self.group.goals) for row in rows for figure in row.figures()]
        self.report.write(self.out / f"{self.report.benchmark}.json")


def compare_engines(run: Run, folder: Path, *, dummy: bool) -> None:
    """Both engines in workers: decode and prefill, then the mixed workload, then both again."""
    group = run.group
    settings = {**group.settings, "model": str(folder), "kv_cache_memory_bytes": group.kv_cache_memory_bytes}
    settings |= {"load_format": "dummy"} if dummy else {}
    settings |= {"tensor_parallel_size": group.tp} if group.tp > 1 else {}
    with ExitStack() as stack:
        workers = {
            OURS: stack.enter_context(started_worker("shoal", settings, run.log(OURS), Python())),
            PEER: stack.enter_context(started_worker(run.peer_engine, settings, run.log(PEER), run.peer_python)),
        }
        ready = wait_for_all(workers, Worker.wait, run.log)
        for name, worker in ready.items():
            run.report.settings[f"{name} ready s"] = round(worker["ready_s"], 1)
            run.report.settings[f"{name} is"] = worker["engine"]
            run.report.device = worker["device"] if group.tp == 1 else f"{group.tp} x {worker['device']}"
        rates = workers[OURS].rates(DTYPE) if OURS in ready else None
        model, vocab_size = Dense.of(folder, DTYPE, group.tp), read_model_facts(folder).vocab_size
        rows: list[Row[Any]] = [
            Decode(batch, context, vocab_size, group.num_decoded, model, rates) for batch, context in group.decode
        ]
        if group.offline is not None:
            rows.append(Offline(mixed_lengths(*group.offline, vocab_size)))
        subjects = {name: workers[name].run for name in ready}
        for one in subjects.values():
            warm_up(one, group.decode, vocab_size)
        alternate(rows, subjects, run.deadline, lambda: run.keep(rows), say=say)


def warm_up(run: Callable[[Workload], float], decode: Sequence[tuple[int, int]], vocab_size: int) -> None:
    """Load everything that is loaded once: four short sequences, and a prompt of every length."""
    draw = random.Random(0)
    for batch, context in [(4, 128), *((1, context) for context in dict.fromkeys(c for _, c in decode))]:
        run(fixed_lengths(draw, batch, context, 8, vocab_size))


def compare_servers(run: Run, folder: Path, *, dummy: bool) -> None:
    """Both servers on one GPU, with one of them under load at a time."""
    group = run.group
    settings = {**group.settings, "kv_cache_memory_bytes": group.kv_cache_memory_bytes}
    settings |= {"load_format": "dummy"} if dummy else {}
    targets = {name: Target("127.0.0.1", free_port(), MODEL_ID) for name in (OURS, PEER)}
    if run.peer_engine == "vllm":
        peer = vllm_arguments(folder, targets[PEER], settings)
    else:  # a machine has one HAProxy: its ports are fixed
        peer = shoal_arguments(folder, targets[PEER], settings, run.shoal_args, "127.0.0.1")
    ours = shoal_arguments(folder, targets[OURS], settings, run.shoal_args, "0.0.0.0")
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(started_server(python, arguments, targets[name], run.log(name)))
            for name, python, arguments in ((OURS, Python(), ours), (PEER, run.peer_python, peer))
        }
        ready = wait_for_all(servers, lambda server: server.wait(group.http_shape), run.log)
        run.report.device = device_name(choose_device("auto"))
        run.report.settings |= {f"{name} ready s": round(seconds, 1) for name, seconds in ready.items()}
        rows: list[Row[Any]] = [
            Http(concurrency, num_requests, group.http_shape) for concurrency, num_requests in group.http
        ]
        subjects = {name: servers[name].target for name in ready}
        alternate(rows, subjects, run.deadline, lambda: run.keep(rows), say=say)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of report and logs")
    parser.add_argument("--budget-s", type=float, help="seconds, loading included, after which no turn begins")
    parser.add_argument("--commit", help="recorded if there is no checkout to read it from")
    parser.add_argument("--peer-engine", choices=["vllm", "shoal"], default="vllm")
    parser.add_argument("--peer-python", default=sys.executable, help="the interpreter that runs the peer")
    parser.add_argument("--peer-path", help="its PYTHONPATH; without it, this process's")
    parser.add_argument("--shoal-args", default="", help="more of `shoal serve`, in one string")
    options = parser.parse_args(arguments)

    group = GROUPS[options.group]
    if (lack := lacking_gpus(group.model, group.tp)) is not None:
        parser.error(lack)
    unwind_when_terminated()
    if options.budget_s is not None:
        group = replace(group, budget_s=options.budget_s)
    settings = {**group.settings, "kv_cache_GiB": group.kv_cache_memory_bytes / (1 << 30), "model": group.model}
    settings |= {"tp": group.tp} if group.tp > 1 else {}
    report = Report(f"vs_vllm_{options.group}".replace("-", "_"), settings=settings)
    if options.commit is not None:
        report.commit = options.commit
    options.out.mkdir(parents=True, exist_ok=True)
    peer_python = Python(options.peer_python, options.peer_path, VLLM_VARIABLES)
    run = Run(group, report, options.out, options.peer_engine, peer_python, shlex.split(options.shoal_args))
    with open_model(group.model) as (folder, dummy):
        (compare_servers if group.http else compare_engines)(run, folder, dummy=dummy)
    report.show()
    say(f"done after {time.monotonic() - run.begin:.0f} s")


if __name__ == "__main__":
    main()
