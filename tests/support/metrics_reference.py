"""The table of docs/metrics.md, made from the collectors: `python -m tests.support.metrics_reference` rewrites it."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.metrics_core import Metric

from shoal.cluster.router.metrics import RouterCollector
from shoal.deploy.openai.metrics import ServingCollector

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics -->\n", "<!-- /metrics -->"
_SUFFIXES = {"counter": "_total", "info": "_info"}
_SHOAL, _VLLM = "shoal_", "vllm:"


def families() -> list[Metric]:
    """Every metric of a router's /metrics."""
    return [*ServingCollector({}, lambda _: []).collect(), *RouterCollector(list).collect()]


def exposed_name(family: Metric) -> str:
    return family.name + _SUFFIXES.get(family.type, "")


def table() -> str:
    """One row per metric, sorted by name, with vLLM's name for the same."""
    found = {exposed_name(family): family for family in families()}
    lines = ["| metric | also | type | labels | meaning |", "|---|---|---|---|---|"]
    for name, family in sorted(found.items()):
        if name.startswith(_VLLM) and name.replace(_VLLM, _SHOAL) in found:
            continue
        alias = name.replace(_SHOAL, _VLLM)
        also = f"`{alias}`" if alias in found and alias != name else ""
        labels = ", ".join(f"`{label}`" for label in getattr(family, "_labelnames", ()))
        lines.append(f"| `{name}` | {also} | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """The page with a new table."""
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
