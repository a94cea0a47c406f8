"""All replicas of one model, and the requests for it: queued, placed, moved when their replica is lost."""

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
from .routed_request import InFlight, QueuedSample, RoutedRequest

logger = logging.getLogger(__name__)


class ModelRouter:
    """Places the requests of one model. Everything here runs in the router's event loop."""

    def __init__(self, model_id: str, secret: bytes, router_id: str, options: RouterOptions) -> None:
        self.model_id = model_id
        self.metrics = ModelRouterMetrics()
        self.links: dict[tuple[str, int], ReplicaClient] = {}
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
        """Connects to replicas that are new. One that is gone keeps its connection for as long as that stands.

        stopping: no replica will come after these; whatever is queued is told so.
        """
        self._stopping = stopping
        if stopping:
            self._empty_queue()
        listed = {info.key: info for info in replicas}
        for key, link in list(self.links.items()):
            link.listed = key in listed
            if not link.listed and not link.connected:
                del self.links[key]
                link.task.cancel()
        for key, info in listed.items():
            if key in self.links:
                self.links[key].draining |= info.draining
            else:
                self.links[key] = ReplicaClient(info, self._secret, self._router_id, self._options, self)

    async def close(self) -> None:
        links, self.links = list(self.links.values()), {}
        await asyncio.gather(*(link.stop() for link in links))
        if self._dispatching is not None:
            self._dispatching.cancel()
        self._empty_queue()

    def _empty_queue(self) -> None:
        while (ticket := self._queue.peek()) is not None:
            self._leave_queue(ticket)
            ticket.generation.fail(ticket.samples, _closing())

    # Requests

    def admit(self, generation: RoutedRequest) -> None:
        """Queues a new request; raises QueueFull, and NoReplica where the model is being stopped."""
        if self._stopping:
            self.metrics.rejected[NoReplica.__name__] += 1
            raise _closing()
        self._arrivals += 1
        ticket = QueuedSample(generation, generation.log.request, self._arrivals)
        try:
            self._queue.push(ticket, retry_after=self._rate.retry_after(len(self._queue)))
        except CapacityError as error:
            self.metrics.rejected[type(error).__name__] += 1
            raise
        generation.tickets.add(ticket)
        self._set_deadline(ticket, self._options.queue_timeout)
        self._dispatch_soon()

    def release(self, generation: RoutedRequest) -> None:
        """The reader is gone: what is unfinished is aborted. Nothing happens for a finished request."""
        for ticket in list(generation.tickets):
            self._leave_queue(ticket)
        by_link: dict[ReplicaClient, list[InFlight]] = {}
        for flight, link in generation.flights.items():
            by_link.setdefault(link, []).append(flight)
        generation.flights.clear()
        for link, flights in by_link.items():
            link.abort(flights)

    def end_sample(self, generation: RoutedRequest, sample: int) -> None:
        """The reader wants no more of one sample, of which it has had tokens; the others go on."""
        generation.log.finish([sample], FinishReason.ABORT)
        if not generation.log.num_open:
            generation.times.finished = self._loop.time()
            self.release(generation)
            generation.wake()
            return
        # A sample that has had tokens goes on alone after the loss of its replica: a ticket of it has no other.
        for ticket in [ticket for ticket in generation.tickets if sample in ticket.samples]:
            self._leave_queue(ticket)
        for flight, link in generation.flights.items():
            if sample in flight.samples:
                link.abort_sample(flight, sample)

    def _set_deadline(self, ticket: QueuedSample, seconds: float) -> None:
        ticket.deadline = self._loop.call_later(seconds, self._expire, ticket, seconds)

    def _expire(self, ticket: QueuedSample, seconds: float) -> None:
        self._leave_queue(ticket)
        num_ready = sum(link.ready for link in self.links.values())
        error = NoReplica(
            f"no replica of {self.model_id} had room within {seconds:g} s ({num_ready} of {len(self.links)} are "
            "reachable); retry, or add replicas",
            retry_after=self._rate.retry_after(len(self._queue)),
        )
        self._fail(ticket.generation, ticket.samples, error)

    def _leave_queue(self, ticket: QueuedSample) -> None:
        self._queue.remove(ticket)
        ticket.generation.tickets.discard(ticket)
        if ticket.deadline is not None:
            ticket.deadline.cancel()

    def _fail(self, generation: RoutedRequest, samples: range, error: ServingError) -> None:
        self.metrics.rejected[type(error).__name__] += 1
        generation.fail(samples, error)

    # Dispatch

    def _dispatch_soon(self) -> None:
        """Dispatches in this turn of the loop when no window is open, else at its end."""
        if self._dispatching is None:
            delay = self._window.delay(self._loop.time())
            if delay > 0.0:
                self._dispatching = self._loop.call_later(delay, self._dispatch)
            else:
                self._dispatching = self._loop.call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Sends every queued request that a replica has room for, in order, in one frame per replica."""
        self._dispatching = None
        ready = [link for link in self.links.values() if link.ready]
        by_link: dict[ReplicaClient, list[InFlight]] = {}
        now = self._loop.time()
        count = 0
        while ready and (ticket := self._queue.peek()) is not None:
            link = self._place(ready, ticket.request)
            if link is None:
                break
            self._leave_queue(ticket)
            num_samples = ticket.request.num_samples
            flight = InFlight(ticket.generation, ticket.request, ticket.arrival, ticket.num_replays, num_samples)
            ticket.generation.flights[flight] = link
            if ticket.generation.times.dispatched is None:
                ticket.generation.times.dispatched = now
                self.metrics.queue_time.observe(now - ticket.generation.times.arrived)
            by_link.setdefault(link, []).append(flight)
            count += 1
        if count:
            self._window.open(now)
            self._rate.add(count, now)
        for link, flights in by_link.items():
            link.submit(flights)

    def _place(self, ready: Sequence[ReplicaClient], request: Request) -> ReplicaClient | None:
        """The replica for a request, with room reserved for it; None when it must wait."""
        began = perf_counter()
        context = (*request.prompt_token_ids, *request.emitted_token_ids)
        # With one replica there is nothing to choose, and a cached prefix only makes its room larger.
        block_size = ready[0].info.block_size
        hashes = chain_hashes(context, block_size, request.cache_salt) if len(self.links) > 1 else []
        facts = RequestFacts(len(context), request.num_samples)
        candidates = [link.candidate(hashes) for link in ready]
        ranking = self._policy(candidates, facts)
        link = None
        if ranking:
            link = ready[ranking[0]]
            link.reserve(request.num_samples, num_blocks_needed(candidates[ranking[0]], facts))
            link.prefixes.add(hashes)
        self.metrics.pick_time.observe(perf_counter() - began)
        return link

    # What links tell

    def on_room(self, link: ReplicaClient) -> None:
        if len(self._queue):
            self._dispatch_soon()

    def on_delta(self, link: ReplicaClient, flight: InFlight, delta: StreamDelta, now: float) -> None:
        generation = flight.generation
        if not flight.num_open:
            generation.flights.pop(flight, None)
        token_delta = generation.log.record(delta)
        if token_delta is None:  # its reader has ended the sample
            return
        times = generation.times
        if times.first_token is None and delta.token_ids:
            times.first_token = now
            if times.dispatched is not None:
                self.metrics.prefill_time.observe(now - times.dispatched)
        if not generation.log.num_open:
            times.finished = now
        generation.push(token_delta)
        if generation.overflown:
            self._cut_slow_reader(generation)

    def _cut_slow_reader(self, generation: RoutedRequest) -> None:
        self.release(generation)
        error = EngineError(
            f"{self._options.max_pending_deltas} parts of the response were not read, and the request was aborted; "
            "read it as it streams"
        )
        generation.fail(generation.log.samples, error)

    def on_rejected(self, link: ReplicaClient, flight: InFlight, error: ServingError) -> None:
        flight.generation.flights.pop(flight, None)
        if isinstance(error, CapacityError) and link.draining and not self._stopping:
            self._requeue(flight, flight.request, self._options.queue_timeout)
        else:
            self._fail(flight.generation, flight.samples, error)

    def on_lost(self, link: ReplicaClient, flights: Sequence[InFlight]) -> None:
        if not link.listed:
            self.links.pop(link.info.key, None)
        if not link.draining:
            self.metrics.replicas_lost += 1
        for flight in flights:
            flight.generation.flights.pop(flight, None)
            self._replay(link, flight)

    # Replay

    def _replay(self, link: ReplicaClient, flight: InFlight) -> None:
        """Goes on with what is unfinished of a flight whose replica is lost."""
        generation, log = flight.generation, flight.generation.log
        flight.num_replays += 1
        for delta in log.complete(flight.samples):
            generation.push(delta)
        if flight.num_replays > self._options.replay_limit:
            error = ReplicaLost(
                f"request {log.request.request_id} lost {flight.num_replays} replicas, the last one "
                f"{link.info.replica_id}, and is not tried again"
            )
            self._fail(generation, flight.samples, error)
            return
        if self._stopping:
            self._fail(generation, flight.samples, _closing())
            return
        for request in log.remaining(flight.samples):
            self.metrics.migrated["replica_lost"] += 1
            self.metrics.tokens_recomputed += len(request.prompt_token_ids) + len(request.emitted_token_ids)
            self._requeue(flight, request, self._options.replay_timeout)

    def _requeue(self, flight: InFlight, request: Request, timeout: float) -> None:
        """Puts an accepted request back, in the place that its arrival gives it."""
        ticket = QueuedSample(flight.generation, request, flight.arrival, flight.num_replays)
        flight.generation.tickets.add(ticket)
        self._queue.push_accepted(ticket)
        self._set_deadline(ticket, timeout)
        self._dispatch_soon()


def _closing() -> NoReplica:
    return NoReplica("this server is stopping; ask another one")
