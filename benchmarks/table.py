"""Results in benchmarks/results/*.json as Markdown tables: printed, or written to docs/performance-tables.md.

python -m benchmarks.table [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, ROOT, cell

PAGE = ROOT / "docs" / "performance-tables.md"
MARK = "<!-- What follows is written by `python -m benchmarks.table --write`. -->"


def markdown(report: dict[str, Any]) -> str:
    """One report as a section: device, settings, rows, and a step's times."""
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items() if value is not None)
    lines = [
        f"## {report['benchmark']}",
        "",
        f"{report['device']}; commit {report['commit'] or 'none'}; {report['date'][:10]}; {settings}",
        "",
        *_table(report["rows"]),
    ]
    if report.get("trace"):
        figures = [{"a step": name, "": value} for name, value in report["trace"].items()]
        lines += ["", *_table(figures)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return head + [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]


def tables(folder: Path) -> str:
    return "\n".join(markdown(json.loads(path.read_text("utf-8"))) for path in sorted(folder.glob("*.json")))


def with_tables(page: str, written: str) -> str:
    """The page with all text after its mark replaced. Raises ValueError without a mark."""
    head, mark, _ = page.partition(MARK)
    if not mark:
        raise ValueError(f"the page has no line {MARK!r}")
    return f"{head}{mark}\n\n{written}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.relative_to(ROOT)}")
    written = tables(RESULTS)
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text("utf-8"), written), "utf-8")
    else:
        print(written)


if __name__ == "__main__":
    main()
