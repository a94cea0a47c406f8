"""The state that the HTTP routes share: the served models, their tokenizers, the router, the keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client.registry import Collector

from ...cluster.router.routed_request import RequestTimes
from ...cluster.wire.errors import NoReplica
from ...cluster.wire.membership import ReplicaInfo
from ...replicas.engine.request_limits import ModelLimits
from ...replicas.errors import UnknownModel
from ...replicas.protocol import ReplicaLoad, Request, TokenDelta
from ...replicas.text.tokenizer import Tokenizer
from ..nearest import did_you_mean
from .auth import KeyRing
from .metrics import ModelMetrics, ServingCollector

# Shorter texts are tokenised on the event loop: a thread would cost more.
_LONG_TEXT_CHARS = 4096
STALLED_AFTER_S = 30.0


class RequestRouter(Protocol):
    """The part of cluster.router.Router that the API uses."""

    def replicas(self, model: str) -> list[tuple[ReplicaInfo, ReplicaLoad]]: ...

    def generate(
        self, model: str, request: Request, *, times: RequestTimes | None = None
    ) -> AsyncGenerator[list[TokenDelta], None]: ...

    def end_sample(self, request_id: str, sample: int) -> None: ...

    async def block_reports(self, model: str) -> list[dict[str, Any]]: ...

    async def reset_prefix_cache(self, model: str) -> bool: ...

    @property
    def collector(self) -> Collector: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model under its public name. `root` is the source of its files."""

    name: str
    tokenizer: Tokenizer
    root: str
    created: int = field(default_factory=lambda: int(time.time()))

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text; long ones are tokenised off the event loop."""
        if sum(map(len, texts)) < _LONG_TEXT_CHARS:
            return self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode_batch, texts, add_special_tokens=add_special_tokens)


class ApiState:
    """Shared by all routes of one router process."""

    def __init__(self, router: RequestRouter, models: Sequence[ServedModel], keys: KeyRing | None = None) -> None:
        self.router = router
        self.models = {model.name: model for model in models}
        self.keys = keys or KeyRing()
        self.metrics = {name: ModelMetrics() for name in self.models}
        self.collector = ServingCollector(self.metrics, lambda name: self.replicas(self.models[name]))
        self._limits: dict[str, ModelLimits] = {}  # the last known
        self._progress: dict[tuple[str, int], tuple[int, float]] = {}  # replica -> (steps, when they last moved)

    def resolve(self, name: str | None) -> ServedModel:
        """The model of this name, or the only model if `name` is None. Raises UnknownModel."""
        if name is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if name in self.models:
            return self.models[name]
        served = ", ".join(map(repr, self.models))
        if name is None:
            raise UnknownModel(f"name a model: this server has {served}")
        raise UnknownModel(
            f"model {name[:128]!r} is not served here{did_you_mean(name, self.models)}; there is {served}"
        )

    def replicas(self, model: ServedModel) -> list[tuple[ReplicaInfo, ReplicaLoad]]:
        """The model's connected replicas; none before the first one is up."""
        try:
            return self.router.replicas(model.name)
        except UnknownModel:
            return []

    def limits(self, model: ServedModel) -> ModelLimits:
        """The smallest limits of the model's replicas. The last known ones while none is up: the router waits for one.

        Raises NoReplica if none was ever up.
        """
        infos = [info for info, _ in self.replicas(model)]
        if infos:
            self._limits[model.name] = ModelLimits(
                vocab_size=min(i.vocab_size for i in infos), max_model_len=min(i.max_model_len for i in infos)
            )
        if model.name not in self._limits:
            raise NoReplica(f"no replica of {model.name!r} is up yet; try again")
        return self._limits[model.name]

    def unhealthy(self) -> str | None:
        """Why the server cannot answer now, or None. A replica that has work must make steps."""
        now = time.monotonic()
        for name, model in self.models.items():
            replicas = self.replicas(model)
            if not any(self._makes_progress(info, load, now) for info, load in replicas):
                return f"no replica of {name!r} makes progress ({len(replicas)} known)"
        return None

    def _makes_progress(self, info: ReplicaInfo, load: ReplicaLoad, now: float) -> bool:
        steps, since = self._progress.get(info.key, (-1, now))
        if load.num_steps != steps or not load.num_running:
            since = now
        self._progress[info.key] = (load.num_steps, since)
        return now - since < STALLED_AFTER_S
