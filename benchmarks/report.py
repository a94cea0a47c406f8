"""Reports of this folder's benchmarks, in the format of `shoal bench`, stored in benchmarks/results."""

from __future__ import annotations

from pathlib import Path

from shoal.deploy.bench.report import Report as _Report
from shoal.deploy.bench.report import cell, commit, cpu_name, device_name

__all__ = ["RESULTS", "ROOT", "Report", "cell", "commit", "cpu_name", "device_name"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


class Report(_Report):
    """A report with a default path."""

    def write(self, path: Path | None = None) -> Path:
        """Write the report as JSON, by default to benchmarks/results/<benchmark>.json; returns the path."""
        return super().write(path or RESULTS / f"{self.benchmark}.json")
