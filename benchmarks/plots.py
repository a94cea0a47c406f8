"""Plots of docs/performance.md, from benchmarks/results/*.json. Plots without data are left out.

python -m benchmarks.plots [--results FOLDER] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import RESULTS, ROOT

OUT = ROOT / "docs" / "img"
_OURS, _PEER, _LIMIT, _MISSED, _FLOOR = "#1f6f8b", "#c8c2b8", "#444444", "#b5523b", "#e8b13c"
# Deterministic output, and text stays text.
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "shoal",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def read(results: Path, name: str) -> dict[str, Any] | None:
    path = results / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def ratios(report: dict[str, Any]) -> Figure | None:
    """Speed relative to vLLM by row, with each row's floor."""
    rows = [row for row in report["rows"] if row["ratio"] is not None and row["floor"] is not None]
    if not rows:
        return None
    figure, axes = _figure(6.4, 0.6 + 0.26 * len(rows))
    rows.reverse()
    places = range(len(rows))
    axes.barh(places, [row["ratio"] for row in rows], color=[_OURS if row["met"] else _MISSED for row in rows])
    axes.plot([row["floor"] for row in rows], places, "|", color=_FLOOR, markersize=12, mew=2, label="floor")
    axes.set_yticks(places, [row["what"] for row in rows])
    axes.axvline(1.0, color=_LIMIT, linewidth=0.8)
    for place, row in zip(places, rows, strict=True):
        axes.text(row["ratio"] + 0.02, place, f"{row['ratio']:.2f}", va="center")
    axes.set_xlabel("times as fast as vLLM in the same run")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def decode(report: dict[str, Any]) -> Figure | None:
    """Milliseconds of a decode step by batch, for both engines, and the device's limit."""
    curves: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for row in report["rows"]:
        found = re.fullmatch(r"decode B=(\d+) @(\d+)", row["what"])
        if found and row["shoal"]:
            curves.setdefault(int(found[2]), []).append((int(found[1]), row))
    if not curves:
        return None
    figure, axes = _figure(6.4, 3.4)
    for (context, points), marker in zip(sorted(curves.items()), "osd^", strict=False):
        points.sort(key=lambda point: point[0])
        batches = [batch for batch, _ in points]
        _curve(axes, batches, [row["shoal"] for _, row in points], f"Shoal, context {context:,}", _OURS, marker, "-")
        _curve(axes, batches, [row["vllm"] for _, row in points], f"vLLM, context {context:,}", _PEER, marker, "-")
        limits = [row["shoal"] * row["of limit"] if "of limit" in row else None for _, row in points]
        _curve(axes, batches, limits, f"limit, context {context:,}", _LIMIT, "", ":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sequences that decode together")
    axes.set_ylabel("ms a step")
    axes.legend(frameon=False, fontsize=8)
    return figure


def kernels(report: dict[str, Any]) -> Figure | None:
    """Each kernel's share of the device's limit, by shape."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        if row.get("of limit"):
            groups.setdefault(row["kernel"], []).append(row)
    if not groups:
        return None
    figure, axes = _figure(6.4, 0.6 + 0.26 * len(groups))
    names = list(reversed(groups))
    for place, name in enumerate(names):
        shares = [min(row["of limit"], 1.2) for row in groups[name]]
        axes.plot(shares, [place] * len(shares), "o", color=_OURS, alpha=0.35, markersize=5)
        axes.plot(max(shares), place, "o", color=_OURS, markersize=6)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.25)
    axes.axvline(1.0, color=_LIMIT, linewidth=0.8, linestyle=":")
    axes.set_xlabel("share of the device's limit; dark: the kernel's best shape")
    return figure


def step(reports: dict[str, dict[str, Any]]) -> Figure | None:
    """Share of each kernel family in a step, for every report with a trace."""
    traces = {name: report["trace"] for name, report in reports.items() if report.get("trace")}
    if not traces:
        return None
    figure, axes = _figure(6.4, 1.4 + 0.4 * len(traces))
    families = {key: 0.0 for trace in traces.values() for key in trace if key.endswith(" %") and key != "GPU idle %"}
    colours = mpl.colormaps["tab20c"].resampled(max(len(families), 2))
    names = list(reversed(traces))
    reach = [0.0] * len(names)
    for number, family in enumerate(families):
        shares = [traces[name].get(family, 0.0) for name in names]
        axes.barh(names, shares, left=reach, color=colours(number), label=family.removesuffix(" %"))
        reach = [so_far + share for so_far, share in zip(reach, shares, strict=True)]
    axes.set_xlabel("% of the time that kernels run")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def plots(results: Path) -> Iterator[tuple[str, Figure]]:
    drawn: list[tuple[str, Figure | None]] = []
    for group in ("8b", "1b", "http", "8b_tp2", "70b_half_tp2", "70b_tp4"):
        report = read(results, f"vs_vllm_{group}")
        if report is not None:
            drawn += [(f"ratios_{group}.svg", ratios(report)), (f"decode_{group}.svg", decode(report))]
    report = read(results, "bench_kernels")
    if report is not None:
        drawn.append(("kernels.svg", kernels(report)))
    reports = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(results.glob("*.json"))}
    drawn.append(("step.svg", step(reports)))
    yield from ((name, figure) for name, figure in drawn if figure is not None)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _curve(axes: Axes, x: list[int], y: list[float | None], label: str, colour: str, marker: str, line: str) -> None:
    points = [(a, b) for a, b in zip(x, y, strict=True) if b]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, figure in plots(arguments.results):
            figure.savefig(arguments.out / name, metadata={"Date": None})
            print(arguments.out / name)


if __name__ == "__main__":
    main()
