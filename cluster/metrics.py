"""A router's metrics, in Prometheus' text form: its own requests, and its replicas' last reports.

Counters and histograms count this router's requests: over several routers they add up. What comes from a replica's
report has the label `engine`, the replica's id, and every router tells the same: take the maximum by `engine`.
Names beginning with `vllm:` are those that existing dashboards and gateways read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..replicas.protocol import ReplicaLoad
from .generation import RequestTimes
from .membership import ReplicaInfo

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_FIRST_TOKEN_SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    40.0,
)
_REQUEST_SECONDS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 120.0, 480.0)
_PICK_SECONDS = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)


class Histogram:
    """Counts by bucket. prometheus_client's takes a lock and a walk over the buckets for every token; this, 0.3 us."""

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


class ModelMetrics:
    """What one router saw of one model's requests."""

    def __init__(self) -> None:
        self.finished: Counter[str] = Counter()  # samples by finish reason
        self.migrated: Counter[str] = Counter()  # requests by the reason why they left their replica
        self.rejected: Counter[str] = Counter()  # requests by the class of the error
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.tokens_recomputed = 0  # context that replays run a second time
        self.time_to_first_token = Histogram(_FIRST_TOKEN_SECONDS)
        self.inter_token = Histogram(_TOKEN_SECONDS)
        self.end_to_end = Histogram(_REQUEST_SECONDS)
        self.queue = Histogram(_REQUEST_SECONDS)
        self.prefill = Histogram(_REQUEST_SECONDS)
        self.decode = Histogram(_REQUEST_SECONDS)
        self.pick = Histogram(_PICK_SECONDS)

    def request_finished(self, times: RequestTimes) -> None:
        """Once per request, with all of its times set."""
        assert times.dispatched is not None, "only what ran can finish"
        assert times.finished is not None, "it is set before"
        self.end_to_end.observe(times.finished - times.arrived)
        if times.first_token is not None:
            self.prefill.observe(times.first_token - times.dispatched)
            self.decode.observe(times.finished - times.first_token)


class PoolView:
    """One model as the metrics see it."""

    def __init__(
        self,
        model_id: str,
        metrics: ModelMetrics,
        num_queued: Callable[[], int],
        replicas: Callable[[], Sequence[tuple[ReplicaInfo, ReplicaLoad]]],
    ) -> None:
        self.model_id = model_id
        self.metrics = metrics
        self.num_queued = num_queued
        self.replicas = replicas


_COUNTERS: tuple[tuple[str, str, str | None, Callable[[ModelMetrics], int | Counter[str]]], ...] = (
    ("vllm:request_success", "Samples that ended, by reason.", "finished_reason", lambda m: m.finished),
    ("vllm:prompt_tokens", "Prompt tokens of the requests taken.", None, lambda m: m.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated.", None, lambda m: m.generation_tokens),
    ("shoal_requests_rejected", "Requests refused, by class of error.", "error", lambda m: m.rejected),
    ("shoal_requests_migrated", "Requests moved to another replica.", "reason", lambda m: m.migrated),
    ("shoal_tokens_recomputed", "Tokens that moved requests ran again.", None, lambda m: m.tokens_recomputed),
)
_HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelMetrics], Histogram]], ...] = (
    ("vllm:time_to_first_token_seconds", "Arrival to first token.", lambda m: m.time_to_first_token),
    ("vllm:inter_token_latency_seconds", "Between two tokens of a sample.", lambda m: m.inter_token),
    ("vllm:e2e_request_latency_seconds", "Arrival to last token.", lambda m: m.end_to_end),
    ("vllm:request_queue_time_seconds", "Arrival to dispatch to a replica.", lambda m: m.queue),
    ("vllm:request_prefill_time_seconds", "Dispatch to first token.", lambda m: m.prefill),
    ("vllm:request_decode_time_seconds", "First to last token.", lambda m: m.decode),
    ("shoal_router_pick_seconds", "Choosing a replica.", lambda m: m.pick),
)
_REPLICA_GAUGES: tuple[tuple[str, str, Callable[[ReplicaLoad], float]], ...] = (
    ("vllm:num_requests_running", "Sequences in the running batch.", lambda r: r.num_running),
    ("vllm:num_requests_waiting", "Sequences that wait for the engine.", lambda r: r.num_waiting),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", lambda r: _usage(r)),
    ("shoal_kv_blocks", "KV blocks.", lambda r: r.num_blocks),
    ("shoal_kv_blocks_free", "KV blocks that a new request can be given.", lambda r: r.num_free_blocks),
    ("shoal_kv_blocks_cached", "Free KV blocks that hold a reusable prefix.", lambda r: r.num_cached_blocks),
    ("shoal_kv_blocks_shared", "KV blocks held by two or more sequences.", lambda r: r.blocks.shared),
)
_REPLICA_COUNTERS: tuple[tuple[str, str, Callable[[ReplicaLoad], int]], ...] = (
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda r: r.prefix_cache_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda r: r.prefix_cache_hits),
    ("vllm:num_preemptions", "Sequences preempted.", lambda r: r.num_preemptions),
    ("shoal_cow_copies", "Copy-on-write copies of KV blocks.", lambda r: r.blocks.copied),
    ("shoal_engine_steps", "Engine steps.", lambda r: r.num_steps),
    ("shoal_engine_prompt_tokens", "Prompt tokens computed or reused.", lambda r: r.prompt_tokens),
    ("shoal_engine_generation_tokens", "Tokens generated by the engine.", lambda r: r.generation_tokens),
)


def _usage(load: ReplicaLoad) -> float:
    return 1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0


class RouterCollector(Collector):
    """Reads a router's state when it is scraped; nothing is kept twice."""

    def __init__(self, pools: Callable[[], Iterable[PoolView]]) -> None:
        self._pools = pools

    def collect(self) -> Iterable[Metric]:
        pools = list(self._pools())
        yield from _request_metrics(pools)
        yield from _replica_metrics(pools)


def _request_metrics(pools: Sequence[PoolView]) -> Iterable[Metric]:
    for name, text, label, read in _COUNTERS:
        family = CounterMetricFamily(name, text, labels=["model_name", *([label] if label else [])])
        for pool in pools:
            value = read(pool.metrics)
            if isinstance(value, Counter):
                for key, count in value.items():
                    family.add_metric([pool.model_id, key], count)
            else:
                family.add_metric([pool.model_id], value)
        yield family
    for name, text, read in _HISTOGRAMS:
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        for pool in pools:
            read(pool.metrics).add_to(family, [pool.model_id])
        yield family


def _replica_metrics(pools: Sequence[PoolView]) -> Iterable[Metric]:
    queued = GaugeMetricFamily("shoal_router_queued", "Requests in the router's queue.", labels=["model_name"])
    replicas = GaugeMetricFamily("shoal_replicas", "Replicas that this router reaches.", labels=["model_name"])
    for pool in pools:
        queued.add_metric([pool.model_id], pool.num_queued())
        replicas.add_metric([pool.model_id], len(pool.replicas()))
    yield queued
    yield replicas
    for make, table in ((GaugeMetricFamily, _REPLICA_GAUGES), (CounterMetricFamily, _REPLICA_COUNTERS)):
        for name, text, read in table:
            family = make(name, text, labels=["model_name", "engine"])
            for pool in pools:
                for info, load in pool.replicas():
                    family.add_metric([pool.model_id, info.replica_id], read(load))
            yield family
    labels = ["model_name", "engine", "block_size", "num_gpu_blocks", "cache_dtype"]
    cache = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is made.", labels=labels)
    for pool in pools:
        for info, _ in pool.replicas():
            cache.add_metric(
                [pool.model_id, info.replica_id, str(info.block_size), str(info.num_blocks), info.dtype], 1
            )
    yield cache


def new_registry(pools: Callable[[], Iterable[PoolView]]) -> CollectorRegistry:
    """A registry of its own, so that several routers in one process do not meet; the API adds its own metrics to it."""
    registry = CollectorRegistry()
    registry.register(RouterCollector(pools))
    return registry


def render(registry: CollectorRegistry) -> bytes:
    """What `/metrics` answers, as CONTENT_TYPE."""
    return generate_latest(registry)
