"""What benchmarks write down: nothing of the machine's paths, and tables that can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.report import RESULTS, ROOT, Report
from benchmarks.table import MARK, markdown, with_tables


def test_settings_name_no_place_of_this_machine(tmp_path: Path) -> None:
    model = ROOT / "deploy" / "models" / "tiny"
    report = Report("demo", settings={"model": str(model), "other": Path("/models/large"), "rounds": 5, "host": "a"})
    report.add(what="a step", median_us=12.5, goal=None)
    written = json.loads(report.write(tmp_path / "demo.json").read_text())
    assert written["settings"] == {"model": "deploy/models/tiny", "other": "large", "rounds": 5, "host": "a"}
    assert written["rows"] == [{"what": "a step", "median_us": 12.5, "goal": None}]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_kept_results_say_where_they_are_from(path: Path) -> None:
    report = json.loads(path.read_text())
    assert report["benchmark"] == path.stem
    assert report["device"]
    assert report["commit"]
    assert report["rows"]
    assert not any(str(value).startswith("/") for value in report["settings"].values())


def test_tables_have_a_row_for_each_figure() -> None:
    report = Report("demo", device="a chip", commit="abc", date="2026-01-02T00:00:00Z", settings={"rounds": 5})
    report.add(batch=1, ratio=1.234567)
    report.add(batch=8, ratio=3.0, note="x")
    lines = markdown(vars(report)).splitlines()
    assert lines[0] == "## demo"
    assert "a chip; commit abc; 2026-01-02; rounds 5" in lines
    assert lines[-2:] == ["| 1 | 1.23 |  |", "| 8 | 3 | x |"]


def test_only_what_follows_the_mark_is_replaced() -> None:
    assert with_tables(f"# Title\n{MARK}\nold\n", "new\n") == f"# Title\n{MARK}\n\nnew\n"
    with pytest.raises(ValueError, match="no line"):
        with_tables("# Title\n", "new\n")
