"""What benchmarks write down: nothing of the machine's paths, and tables that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
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


def test_a_trace_has_a_table_of_its_own() -> None:
    report = Report("demo", device="a chip", commit="abc", date="2026-01-02T00:00:00Z", trace={"host us": 120.5})
    report.add(batch=1)
    assert markdown(vars(report)).splitlines()[-3:] == ["| a step |  |", "|---|---|", "| host us | 120.5 |"]


def test_only_what_follows_the_mark_is_replaced() -> None:
    assert with_tables(f"# Title\n{MARK}\nold\n", "new\n") == f"# Title\n{MARK}\n\nnew\n"
    with pytest.raises(ValueError, match="no line"):
        with_tables("# Title\n", "new\n")


def comparison(what: str, shoal: float, vllm: float, floor: float | None) -> dict[str, Any]:
    ratio = vllm / shoal
    row = {"what": what, "unit": "ms", "shoal": shoal, "vllm": vllm, "ratio": ratio, "of limit": 0.8}
    return row | {"floor": floor, "met": None if floor is None else ratio >= floor}


def test_plots_are_drawn_from_the_figures_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "results"
    report = Report("vs_vllm_8b", device="a chip")
    for batch, shoal, vllm in ((1, 4.0, 4.8), (32, 6.5, 6.0)):
        report.add(**comparison(f"decode B={batch} @1024", shoal, vllm, 1.0))
    report.add(**comparison("prefill B=32 @1024", 3.0, 4.0, None))
    report.write(results / "vs_vllm_8b.json")
    kernels = Report("bench_kernels", device="a chip", trace={"GEMM %": 90.0, "norm %": 10.0, "GPU idle %": 3.0})
    kernels.add(**{"kernel": "silu_mul", "shape": "T=1", "of limit": 0.5})
    kernels.add(kernel="silu_mul", shape="T=9", note="it failed")
    kernels.write(results / "bench_kernels.json")
    for folder in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["plots", "--results", str(results), "--out", str(tmp_path / folder)])
        plots.main()
    drawn = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert drawn == ["decode_8b.svg", "kernels.svg", "ratios_8b.svg", "step.svg"]
    for name in drawn:
        text = (tmp_path / "one" / name).read_text()
        assert text == (tmp_path / "two" / name).read_text()
    ratios = (tmp_path / "one" / "ratios_8b.svg").read_text()
    assert "decode B=32 @1024" in ratios
    assert "0.92" in ratios
    assert "prefill" not in ratios  # it has no floor
