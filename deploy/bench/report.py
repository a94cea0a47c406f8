"""A benchmark's report: machine, commit, date; a table on screen, and JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]  # of a checkout or the installed package


def cpu_name() -> str:
    """The processor's model and the number of usable cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = (
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        )
        model = next(names, model)
    num_cores = len(os.sched_getaffinity(0))
    return f"{model}, {num_cores} core{'s' if num_cores > 1 else ''}"


def device_name(device: str) -> str:
    """The GPU's name for "cuda", else the processor's."""
    if device != "cuda":
        return cpu_name()
    import torch  # imported only for a GPU

    return torch.cuda.get_device_name()


def commit() -> str:
    """The commit of this code's checkout, with `+` if it has changes; empty without one."""
    if not (ROOT / ".git").exists():  # installed; the folder may lie within another repository
        return ""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


@dataclass
class Report:
    """Rows of one run. `device` names what did the work."""

    benchmark: str
    device: str = field(default_factory=cpu_name)
    commit: str = field(default_factory=commit)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    trace: dict[str, Any] = field(default_factory=dict)  # shares of a step's time, if traced

    def add(self, **row: Any) -> None:
        self.rows.append(row)

    def keep(self, path: Path) -> None:
        """Write what there is and show the last row, so that an interrupted run is kept."""
        self.write(path)
        if self.rows:
            last = ", ".join(f"{name} {cell(value)}" for name, value in self.rows[-1].items() if value is not None)
            print(f"{self.benchmark}: {last}", file=sys.stderr, flush=True)

    def show(self) -> None:
        """Print the rows as a table, and the trace's figures as another."""
        # A pipe has no width, and a table cut to 80 columns is useless.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
        console.print(_table(self.benchmark, self.rows))
        if self.trace:
            figures = [{"figure": name, "value": value} for name, value in self.trace.items()]
            console.print(_table("trace, a step", figures))
        console.print(f"{self.device}; commit {self.commit or 'none'}; {self.date}")

    def write(self, path: Path) -> Path:
        """Write the report as JSON; returns the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: _portable(value) for key, value in self.settings.items()}
        path.write_text(json.dumps(asdict(self) | {"settings": settings}, indent=2) + "\n", encoding="utf-8")
        return path


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    return table


def _portable(value: Any) -> Any:
    """A setting for other machines: a path relative to the repository, or only its name."""
    if not isinstance(value, Path | str) or not Path(value).is_absolute():
        return str(value) if isinstance(value, Path) else value
    path = Path(value)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def cell(value: Any) -> str:
    """A table cell: floats to three figures or more, empty for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"
    return "" if value is None else str(value)
