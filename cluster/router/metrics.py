"""Prometheus metrics of a router: queueing, placement and replays.

`deploy/openai/metrics.py` exports client latencies and engine counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..histograms import Histogram

_WAIT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
_PICK_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)


@dataclass(slots=True)
class ModelRouterMetrics:
    """Counts of one model in one router. Times are in seconds."""

    queue_time: Histogram = field(default_factory=lambda: Histogram(_WAIT_SECONDS))
    prefill_time: Histogram = field(default_factory=lambda: Histogram(_WAIT_SECONDS))
    pick_time: Histogram = field(default_factory=lambda: Histogram(_PICK_SECONDS))
    rejected: Counter[str] = field(default_factory=Counter)  # by class of error
    migrated: Counter[str] = field(default_factory=Counter)  # by reason
    tokens_recomputed: int = 0  # context tokens of replayed requests
    replicas_lost: int = 0


class ModelView(NamedTuple):
    """One model at a scrape."""

    model_id: str
    metrics: ModelRouterMetrics
    num_queued: int
    num_replicas: int


_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelRouterMetrics], Histogram]], ...] = (
    ("vllm:request_queue_time_seconds", "Time from arrival to dispatch to a replica", lambda m: m.queue_time),
    ("shoal_request_queue_time_seconds", "Time from arrival to dispatch to a replica", lambda m: m.queue_time),
    ("vllm:request_prefill_time_seconds", "Time from dispatch to the first token", lambda m: m.prefill_time),
    ("shoal_request_prefill_time_seconds", "Time from dispatch to the first token", lambda m: m.prefill_time),
    ("shoal_router_pick_seconds", "Time to choose a replica for a request", lambda m: m.pick_time),
)
_GAUGES: tuple[tuple[str, str, Callable[[ModelView], int]], ...] = (
    ("shoal_router_queued_requests", "Requests in the router's admission queue", lambda v: v.num_queued),
    ("shoal_router_replicas", "Replicas that the router is connected to", lambda v: v.num_replicas),
)
_LABELLED_COUNTERS: tuple[tuple[str, str, str, Callable[[ModelRouterMetrics], Counter[str]]], ...] = (
    ("shoal_router_rejections", "Requests that the router failed, by error", "error", lambda m: m.rejected),
    ("shoal_requests_migrated", "Requests moved to another replica", "reason", lambda m: m.migrated),
)
_COUNTERS: tuple[tuple[str, str, Callable[[ModelRouterMetrics], int]], ...] = (
    ("shoal_tokens_recomputed", "Context tokens recomputed by replayed requests", lambda m: m.tokens_recomputed),
    (
        "shoal_router_replicas_lost",
        "Replicas whose connection ended without a drain (lost rank, engine, node or network)",
        lambda m: m.replicas_lost,
    ),
)


class RouterCollector(Collector):
    """Reads a router's state at each scrape; register it with the registry of `/metrics`."""

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
        for name, text, label, counts in _LABELLED_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model_name", label])
            for view in views:
                for key, count in counts(view.metrics).items():
                    counter.add_metric([view.model_id, key], count)
            yield counter
        for name, text, total in _COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            for view in views:
                counter.add_metric([view.model_id], total(view.metrics))
            yield counter
