"""Counters and latencies for Prometheus, under Shoal's names and vLLM's, so that existing dashboards work.

This collector exports client-side latencies and engine reports; the router has a collector of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ...cluster.histograms import Histogram, add_counts
from ...cluster.wire.membership import ReplicaInfo
from ...replicas.protocol import STEP_SECONDS, ReplicaLoad

PREFIXES = ("shoal_", "vllm:")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 40.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)


@dataclass(slots=True)
class ModelMetrics:
    """What the router saw of one model's requests. Times in seconds."""

    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN_BUCKETS))
    inter_token_latency: Histogram = field(default_factory=lambda: Histogram(_TOKEN_BUCKETS))
    e2e_request_latency: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS))
    request_decode_time: Histogram = field(default_factory=lambda: Histogram(_REQUEST_BUCKETS))
    finished: Counter[str] = field(default_factory=Counter)  # by finish reason
    failed: Counter[int] = field(default_factory=Counter)  # by HTTP status


class ServingCollector(Collector):
    """Gives one scrape: what this process's clients saw, and the replicas' loads as they last reported them."""

    def __init__(
        self, models: dict[str, ModelMetrics], replicas: Callable[[str], list[tuple[ReplicaInfo, ReplicaLoad]]]
    ) -> None:
        self._models = models
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        loads = {name: self._replicas(name) for name in self._models}
        for prefix in PREFIXES:
            yield from _request_families(prefix, self._models)
            yield from _engine_families(prefix, loads)
        yield from _block_families(loads)
        yield from _shard_families(loads)


def render(*collectors: Collector) -> bytes:
    """The text of /metrics."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry)


def _request_families(prefix: str, models: dict[str, ModelMetrics]) -> Iterator[Metric]:
    success = CounterMetricFamily(
        f"{prefix}request_success", "Sequences that ended, by finish reason", labels=["model_name", "finished_reason"]
    )
    failed = CounterMetricFamily(
        f"{prefix}request_failures", "Requests that were refused or failed", labels=["model_name", "status"]
    )
    for name, metrics in models.items():
        for reason, count in metrics.finished.items():
            success.add_metric([name, reason], count)
        for status, count in metrics.failed.items():
            failed.add_metric([name, str(status)], count)
    yield success
    yield failed
    for attribute, text in (
        ("time_to_first_token", "From the request's arrival to its first token"),
        ("inter_token_latency", "Between two tokens of a sequence"),
        ("e2e_request_latency", "From the request's arrival to its last token"),
        ("request_decode_time", "From a request's first token to its last"),
    ):
        family = HistogramMetricFamily(f"{prefix}{attribute}_seconds", text, labels=["model_name"])
        for name, metrics in models.items():
            histogram: Histogram = getattr(metrics, attribute)
            histogram.add_to(family, [name])
        yield family


Loads = dict[str, list[tuple[ReplicaInfo, ReplicaLoad]]]

_GAUGES: tuple[tuple[str, str, Callable[[ReplicaLoad], float]], ...] = (
    ("num_requests_running", "Sequences in the engine's batch", lambda load: load.num_running),
    ("num_requests_waiting", "Sequences that wait for a free slot in the batch", lambda load: load.num_waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", lambda load: _usage(load)),
)
_COUNTERS: tuple[tuple[str, str, Callable[[ReplicaLoad], float]], ...] = (
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda load: load.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda load: load.prefix_cache_hits),
    ("num_preemptions", "Sequences preempted for want of blocks", lambda load: load.num_preemptions),
    ("prompt_tokens", "Prompt tokens computed or reused", lambda load: load.prompt_tokens),
    ("generation_tokens", "Tokens generated", lambda load: load.generation_tokens),
)


def _usage(load: ReplicaLoad) -> float:
    return 1.0 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0


def _engine_families(prefix: str, loads: Loads) -> Iterator[Metric]:
    labels = ["model_name", "engine"]
    for name, text, value in _GAUGES:
        yield _filled(GaugeMetricFamily(prefix + name, text, labels=labels), loads, value)
    for name, text, value in _COUNTERS:
        yield _filled(CounterMetricFamily(prefix + name, text, labels=labels), loads, value)
    info = InfoMetricFamily(f"{prefix}cache_config", "The KV cache's shape", labels=labels)
    for model, replicas in loads.items():
        for replica, load in replicas:
            shape = {"num_gpu_blocks": str(load.num_blocks), "block_size": str(load.block_size)}
            info.add_metric([model, replica.replica_id], shape)
    yield info


def _block_families(loads: Loads) -> Iterable[Metric]:
    labels = ["model_name", "engine"]
    shared = GaugeMetricFamily("shoal_kv_blocks_shared", "KV blocks held by two or more sequences", labels=labels)
    copies = CounterMetricFamily("shoal_cow_copies", "KV blocks copied because a fork wrote to them", labels=labels)
    cached = GaugeMetricFamily("shoal_kv_blocks_cached", "Free KV blocks that hold a reusable prefix", labels=labels)
    return (
        _filled(shared, loads, lambda load: load.blocks.shared),
        _filled(copies, loads, lambda load: load.blocks.copied),
        _filled(cached, loads, lambda load: load.num_cached_blocks),
    )


def _shard_families(loads: Loads) -> Iterable[Metric]:
    labels = ["model_name", "engine"]
    shards = GaugeMetricFamily("shoal_num_shards", "Shards of the replica, which live and die as one", labels=labels)
    for model, replicas in loads.items():
        for replica, _ in replicas:
            shards.add_metric([model, replica.replica_id], replica.num_shards)
    steps = CounterMetricFamily("shoal_num_steps", "Steps that the replica's shards have run", labels=labels)
    times = HistogramMetricFamily(
        "shoal_shard_step_seconds", "A step of all the replica's shards, as its engine sees it", labels=labels
    )
    for model, replicas in loads.items():
        for replica, load in replicas:
            seen = load.step_times
            add_counts(times, [model, replica.replica_id], STEP_SECONDS, seen.counts, seen.seconds)
    return shards, _filled(steps, loads, lambda load: load.num_steps), times


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, loads: Loads, value: Callable[[ReplicaLoad], float]
) -> GaugeMetricFamily | CounterMetricFamily:
    for model, replicas in loads.items():
        for replica, load in replicas:
            family.add_metric([model, replica.replica_id], value(load))
    return family
