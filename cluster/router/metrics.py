"""What only the router knows, for Prometheus: queueing, placement, and requests that had to move.

What clients see (time to first token and so on) and the engines' own counts are told by the HTTP edge; no name is
told twice. All of this is counted per router: over several routers it adds up, but for replicas, of which each router
counts all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_WAIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_PICK_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)


class Histogram:
    """Counts by bucket, for one event loop: an observation is a bisection and two additions, with no lock."""

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
    """Adds a histogram to a family. counts: of each bound, those of the bounds before it left out, and of the rest."""
    names = [*map(str, bounds), "+Inf"]
    family.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)


@dataclass(slots=True)
class ModelRouterMetrics:
    """What a router counts for one model. Times in seconds."""

    queue_time: Histogram = field(default_factory=lambda: Histogram(_WAIT_SECONDS))
    prefill_time: Histogram = field(default_factory=lambda: Histogram(_WAIT_SECONDS))
    pick_time: Histogram = field(default_factory=lambda: Histogram(_PICK_SECONDS))
    rejected: Counter[str] = field(default_factory=Counter)  # by class of error
    migrated: Counter[str] = field(default_factory=Counter)  # by the reason why they left their replica
    tokens_recomputed: int = 0  # context that moved requests run a second time
    replicas_lost: int = 0


class ModelView(NamedTuple):
    """One model at the moment of a scrape."""

    model_id: str
    metrics: ModelRouterMetrics
    num_queued: int
    num_replicas: int


_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelRouterMetrics], Histogram]], ...] = (
    ("vllm:request_queue_time_seconds", "From arrival to dispatch to a replica", lambda m: m.queue_time),
    ("shoal_request_queue_time_seconds", "From arrival to dispatch to a replica", lambda m: m.queue_time),
    ("vllm:request_prefill_time_seconds", "From dispatch to the first token", lambda m: m.prefill_time),
    ("shoal_request_prefill_time_seconds", "From dispatch to the first token", lambda m: m.prefill_time),
    ("shoal_router_pick_seconds", "Choosing a replica for a request", lambda m: m.pick_time),
)
_GAUGES: tuple[tuple[str, str, Callable[[ModelView], int]], ...] = (
    ("shoal_router_queued_requests", "Requests in the router's admission queue", lambda v: v.num_queued),
    ("shoal_router_replicas", "Replicas that the router is connected to", lambda v: v.num_replicas),
)


class RouterCollector(Collector):
    """Reads a router's state when it is scraped; register it with the registry that `/metrics` renders."""

    def __init__(self, views: Callable[[], Iterable[ModelView]]) -> None:
        self._views = views

    def collect(self) -> Iterator[Metric]:
        views = list(self._views())
        for name, text, histogram in _HISTOGRAMS:
            family = HistogramMetricFamily(name, text, labels=["model_name"])
            for view in views:
                histogram(view.metrics).add_to(family, [view.model_id])
            yield family
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            for view in views:
                gauge.add_metric([view.model_id], value(view))
            yield gauge
        yield from _counters(views)


def _counters(views: Sequence[ModelView]) -> Iterator[Metric]:
    rejected = CounterMetricFamily(
        "shoal_router_rejections", "Requests that the router gave up, by error", labels=["model_name", "error"]
    )
    migrated = CounterMetricFamily(
        "shoal_requests_migrated", "Requests moved to another replica", labels=["model_name", "reason"]
    )
    recomputed = CounterMetricFamily(
        "shoal_tokens_recomputed", "Tokens that moved requests had to run again", labels=["model_name"]
    )
    lost = CounterMetricFamily(
        "shoal_router_replicas_lost",
        "Replicas whose connection ended without a drain: a rank, the engine, the node or the link is gone",
        labels=["model_name"],
    )
    for view in views:
        lost.add_metric([view.model_id], view.metrics.replicas_lost)
        for error, count in view.metrics.rejected.items():
            rejected.add_metric([view.model_id, error], count)
        for reason, count in view.metrics.migrated.items():
            migrated.add_metric([view.model_id, reason], count)
        recomputed.add_metric([view.model_id], view.metrics.tokens_recomputed)
    yield from (rejected, migrated, recomputed, lost)
