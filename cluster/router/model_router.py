"""The router of one model: queues requests, places them on replicas, and replays them after a loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from time import perf_counter

from ...replicas.errors import CapacityError, EngineError, ServingError
from ...replicas.protocol import FinishReason, Request
from ..wire.errors import NoReplica, ReplicaLost
from ..wire.frames import StreamDelta
from ..wire.membership import ReplicaInfo
from .metrics import ModelRouterMetrics
from .options import RouterOptions
from .policies import RequestFacts, chain_hashes, least_cost, num_blocks_needed
from .queue import AdmissionQueue, BatchWindow, DepartureRate
from .replica_client import ReplicaClient
from .routed_request import InFlight, QueuedSample, ReplicaConnection, RoutedRequest

logger = logging.getLogger(__name__)


class ModelRouter:
    """Places the requests of one model; runs in the router's event loop."""

    def __init__(self, model_id: str, secret: bytes, router_id: str, options: RouterOptions) -> None:
        self.model_id = model_id
        self.metrics = ModelRouterMetrics()
        self.clients: dict[tuple[str, int], ReplicaClient] = {}
        self._secret = secret
        self._router_id = router_id
        self._options = options
        self._policy = least_cost(options.max_waiting_per_replica)
        self._queue: AdmissionQueue[QueuedSample] = AdmissionQueue(
            options.max_queued_requests, options.max_queued_tokens
        )
        self._window = BatchWindow(options.batching_window)
        self._rate = DepartureRate()
        self._dispatching: asyncio.Handle | None = None
        self._stopping = False
        self._arrivals = 0
        self._loop = asyncio.get_running_loop()

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    # Membership

    def update(self, replicas: Sequence[ReplicaInfo], *, stopping: bool = False) -> None:
        """Connect to new replicas. Removed ones keep their connection until it ends.

        stopping: the model is shutting down; all queued requests fail with NoReplica.
        """
        self._stopping = stopping
        if stopping:
            self._empty_queue()
        listed = {info.key: info for info in replicas}
        for key, client in list(self.clients.items()):
            client.listed = key in listed
            if not client.listed and not client.connected:
                del self.clients[key]
                client.task.cancel()
        for key, info in listed.items():
            if key in self.clients:
                self.clients[key].draining |= info.draining
            else:
                self.clients[key] = ReplicaClient(info, self._secret, self._router_id, self._options, self)

    async def close(self) -> None:
        clients, self.clients = list(self.clients.values()), {}
        await asyncio.gather(*(client.stop() for client in clients))
        if self._dispatching is not None:
            self._dispatching.cancel()
        self._empty_queue()

    def _empty_queue(self) -> None:
        while (queued := self._queue.peek()) is not None:
            self._leave_queue(queued)
            queued.routed.fail(queued.samples, _closing())

    # Requests

    def admit(self, routed: RoutedRequest) -> None:
        """Queue a new request. Raises QueueFull, or NoReplica if the model is stopping."""
        if self._stopping:
            self.metrics.rejected[NoReplica.__name__] += 1
            raise _closing()
        self._arrivals += 1
        queued = QueuedSample(routed, routed.log.request, self._arrivals)
        try:
            self._queue.push(queued, retry_after=self._rate.retry_after(len(self._queue)))
        except CapacityError as error:
            self.metrics.rejected[type(error).__name__] += 1
            raise
        routed.queued_samples.add(queued)
        self._set_deadline(queued, self._options.queue_timeout)
        self._dispatch_soon()

    def release(self, routed: RoutedRequest) -> None:
        """Abort all unfinished samples of a request whose reader has left."""
        for queued in list(routed.queued_samples):
            self._leave_queue(queued)
        by_client: dict[ReplicaConnection, list[InFlight]] = {}
        for in_flight, client in routed.in_flights.items():
            by_client.setdefault(client, []).append(in_flight)
        routed.in_flights.clear()
        for client, in_flights in by_client.items():
            client.abort(in_flights)

    def end_sample(self, routed: RoutedRequest, sample: int) -> None:
        """Abort one sample after its first token; the others continue."""
        routed.log.finish([sample], FinishReason.ABORT)
        if not routed.log.num_open:
            routed.times.finished = self._loop.time()
            self.release(routed)
            routed.wake()
            return
        # A started sample is replayed alone, so its queue entry has no other sample.
        for queued in [queued for queued in routed.queued_samples if sample in queued.samples]:
            self._leave_queue(queued)
        for in_flight, client in routed.in_flights.items():
            if sample in in_flight.samples:
                client.abort_sample(in_flight, sample)

    def _set_deadline(self, queued: QueuedSample, seconds: float) -> None:
        queued.deadline = self._loop.call_later(seconds, self._expire, queued, seconds)

    def _expire(self, queued: QueuedSample, seconds: float) -> None:
        self._leave_queue(queued)
        num_ready = sum(client.ready for client in self.clients.values())
        error = NoReplica(
            f"no replica of {self.model_id} had free capacity within {seconds:g} s ({num_ready} of {len(self.clients)} "
            "are reachable); retry, or add replicas",
            retry_after=self._rate.retry_after(len(self._queue)),
        )
        self._fail(queued.routed, queued.samples, error)

    def _leave_queue(self, queued: QueuedSample) -> None:
        self._queue.remove(queued)
        queued.routed.queued_samples.discard(queued)
        if queued.deadline is not None:
            queued.deadline.cancel()

    def _fail(self, routed: RoutedRequest, samples: range, error: ServingError) -> None:
        self.metrics.rejected[type(error).__name__] += 1
        routed.fail(samples, error)

    # Dispatch

    def _dispatch_soon(self) -> None:
        """Dispatch in this turn of the loop, or at the end of an open batching window."""
        if self._dispatching is None:
            delay = self._window.delay(self._loop.time())
            if delay > 0.0:
                self._dispatching = self._loop.call_later(delay, self._dispatch)
            else:
                self._dispatching = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Send queued requests in order while a replica has capacity, in one frame per replica."""
        self._dispatching = None
        ready = [client for client in self.clients.values() if client.ready]
        by_client: dict[ReplicaClient, list[InFlight]] = {}
        now = self._loop.time()
        count = 0
        while ready and (queued := self._queue.peek()) is not None:
            client = self._place(ready, queued.request)
            if client is None:
                break
            self._leave_queue(queued)
            num_samples = queued.request.num_samples
            in_flight = InFlight(queued.routed, queued.request, queued.arrival, queued.num_replays, num_samples)
            queued.routed.in_flights[in_flight] = client
            if queued.routed.times.dispatched is None:
                queued.routed.times.dispatched = now
                self.metrics.queue_time.observe(now - queued.routed.times.arrived)
            by_client.setdefault(client, []).append(in_flight)
            count += 1
        if count:
            self._window.open(now)
            self._rate.add(count, now)
        for client, in_flights in by_client.items():
            client.submit(in_flights)

    def _place(self, ready: Sequence[ReplicaClient], request: Request) -> ReplicaClient | None:
        """Choose and reserve a replica; None if the request must wait."""
        began = perf_counter()
        context = (*request.prompt_token_ids, *request.emitted_token_ids)
        # With one replica there is no choice, and hashes would cost time only.
        block_size = ready[0].info.block_size
        hashes = chain_hashes(context, block_size, request.cache_salt) if len(self.clients) > 1 else []
        facts = RequestFacts(len(context), request.num_samples)
        candidates = [client.candidate(hashes) for client in ready]
        ranking = self._policy(candidates, facts)
        client = None
        if ranking:
            client = ready[ranking[0]]
            client.reserve(request.num_samples, num_blocks_needed(candidates[ranking[0]], facts))
            client.prefixes.add(hashes)
        self.metrics.pick_time.observe(perf_counter() - began)
        return client

    # Events of the replica clients

    def on_capacity(self, client: ReplicaClient) -> None:
        if len(self._queue):
            self._dispatch_soon()

    def on_delta(self, client: ReplicaClient, in_flight: InFlight, delta: StreamDelta, now: float) -> None:
        routed = in_flight.routed
        if not in_flight.num_open:
            routed.in_flights.pop(in_flight, None)
        token_delta = routed.log.record(delta)
        if token_delta is None:  # the reader ended the sample
            return
        times = routed.times
        if times.first_token is None and delta.token_ids:
            times.first_token = now
            if times.dispatched is not None:
                self.metrics.prefill_time.observe(now - times.dispatched)
        if not routed.log.num_open:
            times.finished = now
        routed.push(token_delta)
        if routed.overflown:
            self._cut_slow_reader(routed)

    def _cut_slow_reader(self, routed: RoutedRequest) -> None:
        self.release(routed)
        error = EngineError(
            f"{self._options.max_pending_deltas} parts of the response were not read, and the request was aborted; "
            "read it as it streams"
        )
        routed.fail(routed.log.samples, error)

    def on_rejected(self, client: ReplicaClient, in_flight: InFlight, error: ServingError) -> None:
        in_flight.routed.in_flights.pop(in_flight, None)
        if isinstance(error, CapacityError) and client.draining and not self._stopping:
            self._requeue(in_flight, in_flight.request, self._options.queue_timeout)
        else:
            self._fail(in_flight.routed, in_flight.samples, error)

    def on_lost(self, client: ReplicaClient, in_flights: Sequence[InFlight]) -> None:
        if not client.listed:
            self.clients.pop(client.info.key, None)
        if not client.draining:
            self.metrics.replicas_lost += 1
        for in_flight in in_flights:
            in_flight.routed.in_flights.pop(in_flight, None)
            self._replay(client, in_flight)

    # Replay

    def _replay(self, client: ReplicaClient, in_flight: InFlight) -> None:
        """Requeue the unfinished samples of a lost replica."""
        routed, log = in_flight.routed, in_flight.routed.log
        in_flight.num_replays += 1
        for delta in log.complete(in_flight.samples):
            routed.push(delta)
        if in_flight.num_replays > self._options.replay_limit:
            error = ReplicaLost(
                f"request {log.request.request_id} lost {in_flight.num_replays} replicas, the last one "
                f"{client.info.replica_id}, and is not retried"
            )
            self._fail(routed, in_flight.samples, error)
            return
        if self._stopping:
            self._fail(routed, in_flight.samples, _closing())
            return
        for request in log.remaining(in_flight.samples):
            self.metrics.migrated["replica_lost"] += 1
            self.metrics.tokens_recomputed += len(request.prompt_token_ids) + len(request.emitted_token_ids)
            self._requeue(in_flight, request, self._options.replay_timeout)

    def _requeue(self, in_flight: InFlight, request: Request, timeout: float) -> None:
        """Queue an accepted request again, ordered by its first arrival."""
        queued = QueuedSample(in_flight.routed, request, in_flight.arrival, in_flight.num_replays)
        in_flight.routed.queued_samples.add(queued)
        self._queue.push_accepted(queued)
        self._set_deadline(queued, timeout)
        self._dispatch_soon()


def _closing() -> NoReplica:
    return NoReplica("this server is stopping; ask another one")
