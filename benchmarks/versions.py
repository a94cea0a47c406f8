"""Two checkouts of Shoal on one device, in turn: shows whether a change made decode or prefill slower.

    python -m benchmarks.versions 8b|1b|tiny --old CHECKOUT [--out FOLDER] [--budget-s S] [--commit C]

Both engines are loaded at once, with equal KV caches and prompts, and take turns row by row. `ratio` above 1 means that
this checkout is faster than CHECKOUT. Each side runs its own checkout's worker.py.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.alternate import Decode, alternate
from benchmarks.report import RESULTS, ROOT, Report
from benchmarks.subjects import Python, Worker, lacking_gpus, say, started_worker, unwind_when_terminated, wait_for_all
from shoal.deploy.bench import latency
from shoal.deploy.bench.shapes import open_model
from shoal.replicas.models.checkpoint import read_model_facts

NEW, OLD = "new", "old"


@dataclass(frozen=True)
class Group:
    """Settings of both engines, and the measured rows (batch, context)."""

    model: str
    settings: Mapping[str, Any]
    decode: Sequence[tuple[int, int]]
    num_decoded: int
    num_turns: int
    budget_s: float


_GPU = {"max_model_len": 16_384, "max_num_seqs": 256, "kv_cache_memory_bytes": 40 << 30}
GROUPS = {
    "8b": Group("8b", _GPU, ((1, 1024), (32, 1024), (256, 1024)), 128, num_turns=6, budget_s=240),
    "1b": Group("1b", _GPU | {"kv_cache_memory_bytes": 16 << 30}, ((1, 1024), (32, 1024)), 128, 6, budget_s=120),
    "tiny": Group(
        "tiny",
        {"max_model_len": 512, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 26, "num_threads": 1},
        ((1, 32), (8, 32)),
        num_decoded=64,
        num_turns=8,
        budget_s=120,
    ),
}


def compare(group: Group, report: Report, out: Path, checkouts: Mapping[str, Path]) -> None:
    """Measure every row of both checkouts in turn; writes the report after every measurement."""
    deadline = time.monotonic() + group.budget_s

    def log(name: str) -> Path:
        return out / f"{report.benchmark}_{name}.log"

    with ExitStack() as stack:
        folder, dummy = stack.enter_context(open_model(group.model))
        settings = {**group.settings, "model": str(folder)} | ({"load_format": "dummy"} if dummy else {})
        vocab_size = read_model_facts(folder).vocab_size
        rows = [Decode(*each, vocab_size, group.num_decoded) for each in group.decode]

        def keep() -> None:
            report.rows = [figure.row({}) for row in rows for figure in row.figures((NEW, OLD))]
            report.write(out / f"{report.benchmark}.json")

        workers = {}
        for name, checkout in checkouts.items():
            python = Python(path=stack.enter_context(_importable(checkout)))
            worker = checkout / "benchmarks" / "worker.py"
            workers[name] = stack.enter_context(started_worker("shoal", dict(settings), log(name), python, worker))
        ready = wait_for_all(workers, Worker.wait, log)
        if len(ready) < len(workers):
            sys.exit("versions: both checkouts must start")
        for name, said in ready.items():
            report.settings[f"{name} ready s"] = round(said["ready_s"], 1)
            report.device = said["device"]
        for name in ready:
            latency.warm_up(workers[name].run, random.Random(0), vocab_size)
        alternate(rows, {name: workers[name].run for name in ready}, deadline, keep, group.num_turns, say)


@contextmanager
def _importable(checkout: Path) -> Iterator[str]:
    """A PYTHONPATH that puts the checkout's `shoal` before any installed one."""
    with tempfile.TemporaryDirectory(prefix="shoal-versions-") as folder:
        Path(folder, "shoal").symlink_to(checkout.resolve(), target_is_directory=True)
        yield os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--old", type=Path, required=True, help="checkout to compare with, such as a `git worktree`")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of report and logs")
    parser.add_argument("--budget-s", type=float, help="seconds, loading included, after which no turn begins")
    parser.add_argument("--commit", help="commits, recorded if there are no checkouts to read them from")
    options = parser.parse_args(arguments)

    group = GROUPS[options.group]
    if (lack := lacking_gpus(group.model, 1)) is not None:
        parser.error(lack)
    if not (options.old / "benchmarks" / "worker.py").is_file():
        parser.error(f"{options.old} is not a checkout of Shoal: it has no benchmarks/worker.py")
    report = Report(f"versions_{options.group}", settings={**group.settings, "model": group.model})
    if options.commit is not None:
        report.commit = options.commit
    if options.budget_s is not None:
        group = replace(group, budget_s=options.budget_s)
    options.out.mkdir(parents=True, exist_ok=True)
    unwind_when_terminated()
    compare(group, report, options.out, {NEW: ROOT, OLD: options.old})
    report.show()


if __name__ == "__main__":
    main()
