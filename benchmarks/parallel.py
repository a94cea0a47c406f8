"""Speedup of more GPUs: Shoal on one, with tensor-parallel and with pipeline-parallel ranks, in turn.

    python -m benchmarks.parallel 8b|tiny [--split NAME ...] [--out FOLDER] [--budget-s S] [--commit C]

All engines stay loaded, each with the same KV cache memory per GPU. Each pipeline stage caches only its own layers,
so a pipeline runs as many sequences as its GPUs would separately. `ratio` is the speed relative to one GPU.
Trial run on a CPU: tiny.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.alternate import Decode, Goals, Offline, Row, alternate
from benchmarks.report import RESULTS, Report
from benchmarks.subjects import Python, Worker, lacking_gpus, say, started_worker, unwind_when_terminated, wait_for_all
from benchmarks.vs_vllm import warm_up
from shoal.deploy.bench.shapes import open_model
from shoal.deploy.bench.workload import mixed_lengths
from shoal.replicas.models.checkpoint import read_model_facts

ONE = "one GPU"


@dataclass(frozen=True)
class Group:
    """One run of one model; `goals` by split."""

    model: str
    budget_s: float
    settings: Mapping[str, Any]
    splits: Mapping[str, Mapping[str, Any]]  # differences from one GPU
    decode: Sequence[tuple[int, int]]  # batch, context
    num_decoded: int
    offline: tuple[int, int, int]  # requests, shortest, longest
    goals: Mapping[str, Goals]


GROUPS = {
    "8b": Group(
        "8b",
        budget_s=420,
        settings={"max_model_len": 16_384, "max_num_seqs": 256, "kv_cache_memory_bytes": 24 << 30},
        splits={
            "tp 2": {"tensor_parallel_size": 2},
            "pp 2": {"pipeline_parallel_size": 2, "max_num_seqs": 512},
        },
        decode=((1, 1024), (128, 1024)),
        num_decoded=128,
        # 8 times a pipeline's batch: it stays full for most of the time.
        offline=(4000, 100, 512),
        goals={"tp 2": {"decode B=128 @1024": (1.5, 1.7)}, "pp 2": {"offline throughput": (1.8, 2.0)}},
    ),
    "tiny": Group(
        "tiny",
        budget_s=120,
        settings={"max_model_len": 512, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 26, "num_threads": 1},
        splits={
            "tp 2": {"tensor_parallel_size": 2},
            "pp 2": {"pipeline_parallel_size": 2, "max_num_seqs": 8},
        },
        decode=((2, 32),),
        num_decoded=4,
        offline=(6, 4, 16),
        goals={"pp 2": {"offline throughput": (0.1, 1.0)}},
    ),
}


def compare(group: Group, report: Report, out: Path, folder: Path, *, dummy: bool) -> None:
    """All engines in workers, every row of each in turn; writes the report after every measurement."""
    deadline = time.monotonic() + group.budget_s
    settings = {**group.settings, "model": str(folder)} | ({"load_format": "dummy"} if dummy else {})
    subjects = {ONE: settings, **{name: {**settings, **split} for name, split in group.splits.items()}}
    vocab_size = read_model_facts(folder).vocab_size
    rows: list[Row[Any]] = [Decode(*each, vocab_size, group.num_decoded) for each in group.decode]
    rows.append(Offline(mixed_lengths(*group.offline, vocab_size)))

    def log(name: str) -> Path:
        return out / f"{report.benchmark}_{name.replace(' ', '_')}.log"

    def keep() -> None:
        figures = [(name, figure) for name in group.splits for row in rows for figure in row.figures((name, ONE))]
        report.rows = [_row(name, figure.row(group.goals.get(name, {}))) for name, figure in figures]
        report.write(out / f"{report.benchmark}.json")

    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(started_worker("shoal", its, log(name), Python()))
            for name, its in subjects.items()
        }
        ready = wait_for_all(workers, Worker.wait, log)
        for name, said in ready.items():
            report.settings[f"{name} ready s"] = round(said["ready_s"], 1)
            report.device = f"{_num_gpus(group)} x {said['device']}"
        runs = {name: workers[name].run for name in ready}
        for run in runs.values():
            warm_up(run, group.decode, vocab_size)
        alternate(rows, runs, deadline, keep, say=say)


def _num_gpus(group: Group) -> int:
    return max(math.prod(value for key, value in split.items() if "parallel" in key) for split in group.splits.values())


def _row(split: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"split": split} | {"split's" if key == split else key: value for key, value in row.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument(
        "--split", action="append", help='only these: "tp 2", "pp 2"; the report is then named after them'
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of report and logs")
    parser.add_argument("--budget-s", type=float, help="seconds, loading included, after which no turn begins")
    parser.add_argument("--commit", help="recorded if there is no checkout to read it from")
    options = parser.parse_args(arguments)

    group = GROUPS[options.group]
    name = "_".join(["parallel", options.group, *(options.split or ())]).replace(" ", "")
    report = Report(name, settings={**group.settings, "model": group.model})
    if options.split is not None:
        unknown = sorted(set(options.split) - set(group.splits))
        if unknown:
            parser.error(f"--split {unknown[0]!r} is not known; there are {', '.join(map(repr, group.splits))}")
        group = replace(group, splits={split: group.splits[split] for split in options.split})
    if (lack := lacking_gpus(group.model, _num_gpus(group))) is not None:
        parser.error(lack)
    if options.commit is not None:
        report.commit = options.commit
    if options.budget_s is not None:
        group = replace(group, budget_s=options.budget_s)
    options.out.mkdir(parents=True, exist_ok=True)
    unwind_when_terminated()
    with open_model(group.model) as (folder, dummy):
        compare(group, report, options.out, folder, dummy=dummy)
    report.show()


if __name__ == "__main__":
    main()
