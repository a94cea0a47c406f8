"""Prometheus histograms for one event loop, used by router and HTTP layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily


class Histogram:
    """Counts by bucket, without a lock: an observation is a bisection and two additions."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        add_counts(family, labels, self._bounds, self._counts, self._sum)


def add_counts(
    family: HistogramMetricFamily, labels: Sequence[str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> None:
    """Add a histogram to a family. counts: per bucket, not cumulative, the last above all bounds."""
    names = [*map(str, bounds), "+Inf"]
    family.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)
