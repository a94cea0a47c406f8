"""What every benchmark says about itself: the machine, the commit, the date; a table on screen and a file of JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def cpu_name() -> str:
    """The processor's model and the number of cores this process may use."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        model = next(names, model)
    num_cores = len(os.sched_getaffinity(0))
    return f"{model}, {num_cores} core{'s' if num_cores > 1 else ''}"


def commit() -> str:
    """The commit of the working tree, with `+` where it has changes; empty outside of a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


@dataclass
class Report:
    """Rows of one benchmark run. `device` is whatever did the work, by name."""

    benchmark: str
    device: str = field(default_factory=cpu_name)
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def show(self) -> None:
        """Print the rows as a table; numbers to three figures or more."""
        console = Console(highlight=False)
        table = Table(title=self.benchmark, title_justify="left", caption_justify="left")
        table.caption = f"{self.device}; commit {self.commit or 'none'}; {self.date}"
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        for column in columns:
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(cell(row.get(column)) for column in columns))
        console.print(table)

    def write(self, path: Path | None = None) -> Path:
        """Write the report as JSON, by default to benchmarks/results/<benchmark>.json; returns the path."""
        path = path or RESULTS / f"{self.benchmark}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: _portable(value) for key, value in self.settings.items()}
        path.write_text(json.dumps(asdict(self) | {"settings": settings}, indent=2) + "\n", encoding="utf-8")
        return path


def _portable(value: Any) -> Any:
    """A setting as another machine can read it: a path within the repository relative to it, of others the name."""
    if not isinstance(value, Path | str) or not Path(value).is_absolute():
        return str(value) if isinstance(value, Path) else value
    path = Path(value)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def cell(value: Any) -> str:
    """A value of a row as a table shows it: floats to three figures or more, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return "" if value is None else str(value)
