"""The router: places each request on a replica of its model and streams the output."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from ...replicas.errors import ServingError, UnknownModel
from ...replicas.protocol import ReplicaLoad, Request, TokenDelta
from ..wire.errors import ReplicaLost
from ..wire.frames import CallName
from ..wire.membership import Membership, MembershipSource, ReplicaInfo
from .metrics import ModelView, RouterCollector
from .model_router import ModelRouter
from .options import RouterOptions
from .replica_client import ReplicaClient
from .routed_request import RequestTimes, RoutedRequest

logger = logging.getLogger(__name__)

_RETRY_WATCH = 0.5  # seconds between retries of a failed membership watch


class Router:
    """Streams requests through the replicas in `source`.

    All methods run in one event loop. collector: for a Prometheus registry.
    """

    def __init__(self, source: MembershipSource, secret: bytes, options: RouterOptions | None = None) -> None:
        self.options = options or RouterOptions()
        self.router_id = secrets.token_hex(8)
        self.collector = RouterCollector(self._views)
        self._source = source
        self._secret = secret
        self._model_routers: dict[str, ModelRouter] = {}
        self._running: dict[str, tuple[ModelRouter, RoutedRequest]] = {}  # by request id
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Watch the membership; returns after one attempt to connect to each replica."""
        membership = await self._source.watch(None)
        self._update(membership)
        self._watcher = asyncio.create_task(self._watch(membership.version))
        await asyncio.gather(
            *(
                client.attempted.wait()
                for model_router in self._model_routers.values()
                for client in model_router.clients.values()
            )
        )

    async def close(self) -> None:
        """Close all connections; replicas abort this router's requests."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await asyncio.gather(*(model_router.close() for model_router in self._model_routers.values()))

    def models(self) -> list[str]:
        """Names of all models ever served, sorted."""
        return sorted(self._model_routers)

    def replicas(self, model: str) -> list[tuple[ReplicaInfo, ReplicaLoad]]:
        """Connected replicas and their last loads. Raises UnknownModel."""
        return [(client.info, client.load) for client in self._connected(model)]

    async def generate(
        self, model: str, request: Request, *, times: RequestTimes | None = None
    ) -> AsyncGenerator[list[TokenDelta], None]:
        """Yield new deltas after each engine step, until every sample has had its terminal delta.

        Raises RequestError or CapacityError before the first item; later errors are terminal deltas with
        FinishReason.ERROR. `aclose()` aborts the request. Its seed must be drawn, for replays, and its id
        unique among running requests. Fills in `times`.
        """
        model_router = self._model_router(model)
        times = times if times is not None else RequestTimes()
        times.arrived = asyncio.get_running_loop().time()
        routed = RoutedRequest(request, times, self.options.max_pending_deltas)
        model_router.admit(routed)
        self._running[request.request_id] = model_router, routed
        try:
            while deltas := await routed.next():
                yield deltas
        finally:
            self._running.pop(request.request_id, None)
            model_router.release(routed)

    def end_sample(self, request_id: str, sample: int) -> None:
        """Abort one started sample, for example at a stop string; no further delta follows."""
        if request_id in self._running:
            model_router, routed = self._running[request_id]
            model_router.end_sample(routed, sample)

    async def block_reports(self, model: str) -> list[dict[str, Any]]:
        """Reports of the block pool and of running requests, per replica. Raises UnknownModel."""
        clients = self._connected(model)
        answers = await self._call_all(clients, "block_reports")
        return [
            {
                "replica_id": client.info.replica_id,
                "num_blocks": client.load.num_blocks,
                "num_free_blocks": client.load.num_free_blocks,
                "blocks": asdict(client.load.blocks),
                "requests": {request_id: asdict(report) for request_id, report in answer.items()},
            }
            for client, answer in zip(clients, answers, strict=True)
            if answer is not None
        ]

    async def reset_prefix_cache(self, model: str) -> bool:
        """Empty all prefix caches; False if a replica had running requests. Raises UnknownModel."""
        clients = self._connected(model)
        for client in clients:
            client.prefixes.clear()
        return all(await self._call_all(clients, "reset_prefix_cache"))

    async def drain(self, model: str, replica_id: str) -> bool:
        """Stop a replica from accepting requests; False if it is not connected. Raises UnknownModel."""
        clients = [client for client in self._connected(model) if client.info.replica_id == replica_id]
        await self._call_all(clients, "drain")
        return bool(clients)

    def _model_router(self, model: str) -> ModelRouter:
        model_router = self._model_routers.get(model)
        if model_router is None:
            raise UnknownModel(
                f"model {model!r} is not served; the models are: {', '.join(self.models()) or 'none yet'}"
            )
        return model_router

    def _connected(self, model: str) -> list[ReplicaClient]:
        return [client for client in self._model_router(model).clients.values() if client.connected]

    async def _call_all(self, clients: Sequence[ReplicaClient], name: CallName) -> list[Any]:
        """Each replica's answer; None for one lost meanwhile."""
        answers = await asyncio.gather(*(client.call(name) for client in clients), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ReplicaLost):
                raise answer
        return [None if isinstance(answer, ReplicaLost) else answer for answer in answers]

    def _update(self, membership: Membership) -> None:
        by_model: dict[str, list[ReplicaInfo]] = {model: [] for model in self._model_routers}
        for info in membership.replicas:
            by_model.setdefault(info.model_id, []).append(info)
        for model, infos in by_model.items():
            if model not in self._model_routers:
                self._model_routers[model] = ModelRouter(model, self._secret, self.router_id, self.options)
            self._model_routers[model].update(infos, stopping=model in membership.stopping)

    async def _watch(self, version: int) -> None:
        while True:
            try:
                membership = await self._source.watch(version)
            except ServingError as error:
                logger.warning("could not read the membership, retrying: %s", error)
                await asyncio.sleep(_RETRY_WATCH)
                continue
            if membership.version != version:
                version = membership.version
                self._update(membership)

    def _views(self) -> list[ModelView]:
        return [
            ModelView(model, model_router.metrics, model_router.num_queued, len(self._connected(model)))
            for model, model_router in self._model_routers.items()
        ]
