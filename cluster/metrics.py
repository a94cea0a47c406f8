"""A router's metrics, in Prometheus' text form: its own requests, and its replicas' last reports.

Counters and histograms of requests are this router's: over several routers they add up. What comes from a replica's
report has the label `engine`, the replica's id, and every router tells the same: take the maximum by `engine`.
What has one of vLLM's names is told as `vllm:` and as `shoal_`, so that existing dashboards and gateways work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..replicas.protocol import ReplicaLoad
from .generation import RequestTimes
from .membership import ReplicaInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_PREFIXES = ("vllm:", "shoal_")
_PICK_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_WAIT_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0, 80.0)
_REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)


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
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


def _histogram(bounds: Sequence[float]) -> Histogram:
    return field(default_factory=lambda: Histogram(bounds))


@dataclass(slots=True)
class PoolMetrics:
    """What a router counts for one model. Times in seconds."""

    finished: Counter[str] = field(default_factory=Counter)  # sequences by finish reason
    rejected: Counter[str] = field(default_factory=Counter)  # requests by class of error
    migrated: Counter[str] = field(default_factory=Counter)  # requests by the reason why they left their replica
    tokens_recomputed: int = 0  # context that moved requests run a second time
    time_to_first_token: Histogram = _histogram(_WAIT_SECONDS)
    inter_token_latency: Histogram = _histogram(_TOKEN_SECONDS)
    e2e_request_latency: Histogram = _histogram(_REQUEST_SECONDS)
    request_queue_time: Histogram = _histogram(_WAIT_SECONDS)
    request_prefill_time: Histogram = _histogram(_WAIT_SECONDS)
    request_decode_time: Histogram = _histogram(_REQUEST_SECONDS)
    pick_time: Histogram = _histogram(_PICK_SECONDS)

    def first_token_came(self, times: RequestTimes, now: float) -> None:
        self.time_to_first_token.observe(now - times.arrived)
        if times.dispatched is not None:
            self.request_prefill_time.observe(now - times.dispatched)

    def request_ended(self, times: RequestTimes, now: float) -> None:
        self.e2e_request_latency.observe(now - times.arrived)
        if times.first_token is not None:
            self.request_decode_time.observe(now - times.first_token)


class PoolView(NamedTuple):
    """One model at the moment of a scrape."""

    model_id: str
    metrics: PoolMetrics
    num_queued: int
    replicas: list[tuple[ReplicaInfo, ReplicaLoad]]


_HISTOGRAMS: tuple[tuple[str, str, Callable[[PoolMetrics], Histogram]], ...] = (
    ("time_to_first_token", "From arrival to the first token", lambda m: m.time_to_first_token),
    ("inter_token_latency", "Between two tokens of a sequence", lambda m: m.inter_token_latency),
    ("e2e_request_latency", "From arrival to the last token", lambda m: m.e2e_request_latency),
    ("request_queue_time", "From arrival to dispatch to a replica", lambda m: m.request_queue_time),
    ("request_prefill_time", "From dispatch to the first token", lambda m: m.request_prefill_time),
    ("request_decode_time", "From the first token to the last", lambda m: m.request_decode_time),
)
_REPLICA_GAUGES: tuple[tuple[str, str, Callable[[ReplicaLoad], float]], ...] = (
    ("num_requests_running", "Sequences in the engine's batch", lambda load: load.num_running),
    ("num_requests_waiting", "Sequences that wait for room in the batch", lambda load: load.num_waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", lambda load: _usage(load)),
)
_REPLICA_COUNTERS: tuple[tuple[str, str, Callable[[ReplicaLoad], int]], ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda load: load.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda load: load.prefix_cache_hits),
    ("num_preemptions", "Sequences preempted for want of blocks", lambda load: load.num_preemptions),
    ("prompt_tokens", "Prompt tokens computed or reused", lambda load: load.prompt_tokens),
    ("generation_tokens", "Tokens generated", lambda load: load.generation_tokens),
)
_BLOCK_GAUGES: tuple[tuple[str, str, Callable[[ReplicaLoad], int]], ...] = (
    ("shoal_kv_blocks", "KV blocks", lambda load: load.num_blocks),
    ("shoal_kv_blocks_free", "KV blocks that a new request can be given", lambda load: load.num_free_blocks),
    ("shoal_kv_blocks_cached", "Free KV blocks that hold a reusable prefix", lambda load: load.num_cached_blocks),
    ("shoal_kv_blocks_shared", "KV blocks held by two or more sequences", lambda load: load.blocks.shared),
)


def _usage(load: ReplicaLoad) -> float:
    return 1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0


class RouterCollector(Collector):
    """Reads a router's state when it is scraped; nothing is kept twice."""

    def __init__(self, views: Callable[[], Iterable[PoolView]]) -> None:
        self._views = views

    def collect(self) -> Iterator[Metric]:
        views = list(self._views())
        for prefix in _PREFIXES:
            yield from _request_families(prefix, views)
            yield from _replica_families(prefix, views)
        yield from _placement_families(views)
        yield from _block_families(views)


def render(collector: Collector) -> bytes:
    """What `/metrics` answers, as CONTENT_TYPE."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


def _request_families(prefix: str, views: Sequence[PoolView]) -> Iterator[Metric]:
    yield _counted(f"{prefix}request_success", "Sequences that ended", "finished_reason", views, lambda m: m.finished)
    for name, text, histogram in _HISTOGRAMS:
        yield _timed(f"{prefix}{name}_seconds", text, views, histogram)


def _replica_families(prefix: str, views: Sequence[PoolView]) -> Iterator[Metric]:
    labels = ["model_name", "engine"]
    for name, text, value in _REPLICA_GAUGES:
        yield _per_replica(GaugeMetricFamily(prefix + name, text, labels=labels), views, value)
    for name, text, value in _REPLICA_COUNTERS:
        yield _per_replica(CounterMetricFamily(prefix + name, text, labels=labels), views, value)
    shape = InfoMetricFamily(f"{prefix}cache_config", "The KV cache's shape", labels=labels)
    for view in views:
        for info, _ in view.replicas:
            sizes = {"num_gpu_blocks": str(info.num_blocks), "block_size": str(info.block_size)}
            shape.add_metric([view.model_id, info.replica_id], {**sizes, "cache_dtype": info.dtype})
    yield shape


def _placement_families(views: Sequence[PoolView]) -> Iterator[Metric]:
    yield _counted("shoal_router_rejections", "Requests given up, by error", "error", views, lambda m: m.rejected)
    yield _counted("shoal_requests_migrated", "Requests moved to a replica", "reason", views, lambda m: m.migrated)
    yield _timed("shoal_router_pick_seconds", "Choosing a replica for a request", views, lambda m: m.pick_time)
    recomputed = CounterMetricFamily(
        "shoal_tokens_recomputed", "Tokens that moved requests had to run again", labels=["model_name"]
    )
    queued = GaugeMetricFamily("shoal_router_queued_requests", "Requests in the router's queue", labels=["model_name"])
    replicas = GaugeMetricFamily("shoal_router_replicas", "Replicas that the router reaches", labels=["model_name"])
    for view in views:
        recomputed.add_metric([view.model_id], view.metrics.tokens_recomputed)
        queued.add_metric([view.model_id], view.num_queued)
        replicas.add_metric([view.model_id], len(view.replicas))
    yield from (recomputed, queued, replicas)


def _block_families(views: Sequence[PoolView]) -> Iterator[Metric]:
    labels = ["model_name", "engine"]
    for name, text, value in _BLOCK_GAUGES:
        yield _per_replica(GaugeMetricFamily(name, text, labels=labels), views, value)
    copies = CounterMetricFamily("shoal_cow_copies", "KV blocks copied because a fork wrote to them", labels=labels)
    yield _per_replica(copies, views, lambda load: load.blocks.copied)


def _counted(
    name: str, text: str, label: str, views: Sequence[PoolView], read: Callable[[PoolMetrics], Counter[str]]
) -> Metric:
    family = CounterMetricFamily(name, text, labels=["model_name", label])
    for view in views:
        for key, count in read(view.metrics).items():
            family.add_metric([view.model_id, key], count)
    return family


def _timed(name: str, text: str, views: Sequence[PoolView], read: Callable[[PoolMetrics], Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=["model_name"])
    for view in views:
        read(view.metrics).add_to(family, [view.model_id])
    return family


def _per_replica(
    family: GaugeMetricFamily | CounterMetricFamily, views: Sequence[PoolView], value: Callable[[ReplicaLoad], float]
) -> Metric:
    for view in views:
        for info, load in view.replicas:
            family.add_metric([view.model_id, info.replica_id], value(load))
    return family
