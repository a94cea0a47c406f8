"""docs/metrics.md lists every metric, with type, labels and help."""

from __future__ import annotations

from collections import Counter

from tests.support.metrics_reference import PAGE, exposed_name, families, with_table


def test_the_page_has_every_metric() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_table(page), "run: python -m tests.support.metrics_reference"
    assert all(f"`{exposed_name(family)}`" in page for family in families())


def test_each_metric_has_one_exporter_and_a_help_text() -> None:
    counts = Counter(exposed_name(family) for family in families())
    assert [name for name, count in counts.items() if count > 1] == []
    assert all(family.documentation for family in families())
