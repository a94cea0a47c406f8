"""A router's client of one replica: reconnects, tracks its load and its in-flight requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from ...replicas.errors import ServingError
from ...replicas.protocol import ReplicaLoad
from ..wire.errors import ReplicaLost, WireError
from ..wire.frames import (
    CALL_RESULTS,
    Abort,
    AbortItem,
    Call,
    CallName,
    Connection,
    Draining,
    Ping,
    Pong,
    Rejected,
    Reply,
    Step,
    StreamDelta,
    Submit,
    SubmitItem,
    checked,
    decode,
    from_remote_error,
    replica_message_decoder,
)
from ..wire.handshake import prove_as_router
from ..wire.membership import ReplicaInfo
from .options import RouterOptions
from .policies import Candidate, PrefixIndex
from .routed_request import InFlight

logger = logging.getLogger(__name__)


class ReplicaListener(Protocol):
    """Receives the events of a client."""

    def on_delta(self, client: ReplicaClient, in_flight: InFlight, delta: StreamDelta, now: float) -> None: ...

    def on_rejected(self, client: ReplicaClient, in_flight: InFlight, error: ServingError) -> None: ...

    def on_capacity(self, client: ReplicaClient) -> None:
        """The replica may have more free capacity."""
        ...

    def on_lost(self, client: ReplicaClient, in_flights: Sequence[InFlight]) -> None: ...


class ReplicaClient:
    """Connects to `info`'s replica, and reconnects until `stop`."""

    def __init__(
        self, info: ReplicaInfo, secret: bytes, router_id: str, options: RouterOptions, listener: ReplicaListener
    ) -> None:
        self.info = info
        self.load = ReplicaLoad(num_blocks=info.num_blocks, block_size=info.block_size)
        self.prefixes = PrefixIndex(options.prefix_index_blocks)
        self.draining = info.draining
        self.listed = True  # in the membership; if not, the client ends with its connection
        self.attempted = asyncio.Event()  # the first attempt has succeeded or failed
        self._secret = secret
        self._router_id = router_id
        self._options = options
        self._listener = listener
        self._connection: Connection | None = None
        self._lost = asyncio.Event()
        self._in_flights: dict[int, InFlight] = {}  # by stream
        self._next_stream = 0
        self._calls: dict[int, tuple[CallName, asyncio.Future[Any]]] = {}
        self._next_call = 0
        self._heard_at = 0.0
        self._stopping = False
        self._forget_recent()
        self._loop = asyncio.get_running_loop()
        self.task = asyncio.create_task(self._run())

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def ready(self) -> bool:
        """Whether new requests may be sent."""
        return self._connection is not None and not self.draining

    async def stop(self) -> None:
        self._stopping = True
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def candidate(self, hashes: Sequence[bytes]) -> Candidate:
        """The replica for the policy: its last load, corrected by requests sent and ended since."""
        load = self.load
        running = load.num_running - self._recent_ends
        return Candidate(
            num_running=max(running, 0),
            # Requests sent since the report may have ended as well.
            num_waiting=max(load.num_waiting + self._recent_sequences + min(running, 0), 0),
            num_blocks=load.num_blocks,
            num_free_blocks=load.num_free_blocks - self._recent_blocks,
            block_size=load.block_size,
            max_num_seqs=self.info.max_num_seqs,
            num_cached_tokens=self.prefixes.num_blocks(hashes) * load.block_size,
        )

    def reserve(self, num_sequences: int, num_blocks: int) -> None:
        """Count a request about to be sent, until the replica's next report."""
        self._recent_sequences += num_sequences
        self._recent_blocks += num_blocks

    def _forget_recent(self) -> None:
        self._recent_sequences = 0
        self._recent_blocks = 0
        self._recent_ends = 0

    def submit(self, in_flights: Sequence[InFlight]) -> None:
        """Send the requests in one frame."""
        assert self._connection is not None, "a client without a connection is not a candidate"
        items: list[SubmitItem] = []
        for in_flight in in_flights:
            self._next_stream += 1
            in_flight.stream = self._next_stream
            self._in_flights[in_flight.stream] = in_flight
            items.append(SubmitItem(self._next_stream, in_flight.request))
        self._connection.send(Submit(items))

    def abort(self, in_flights: Sequence[InFlight]) -> None:
        """Drop the requests and abort them on the replica."""
        known = [in_flight for in_flight in in_flights if self._in_flights.pop(in_flight.stream, None) is not None]
        if known and self._connection is not None:
            self._connection.send(Abort([AbortItem(in_flight.stream) for in_flight in known]))

    def abort_sample(self, in_flight: InFlight, sample: int) -> None:
        """Abort one sample on the replica; its terminal delta arrives as any other."""
        if in_flight.stream in self._in_flights and self._connection is not None:
            self._connection.send(Abort([AbortItem(in_flight.stream, sample)]))

    async def call(self, name: CallName) -> Any:
        """Call the replica; the result's type is in CALL_RESULTS. Raises the replica's ServingError, or ReplicaLost."""
        if self._connection is None:
            raise ReplicaLost(f"replica {self.info.replica_id} is not connected")
        self._next_call += 1
        future: asyncio.Future[Any] = self._loop.create_future()
        self._calls[self._next_call] = name, future
        self._connection.send(Call(self._next_call, name))
        return await future

    # The connection

    async def _run(self) -> None:
        try:
            await self._keep_connected()
        finally:
            self.attempted.set()

    async def _keep_connected(self) -> None:
        delay = self._options.reconnect_delay
        while self.listed:
            began = self._loop.time()
            try:
                connection = await self._connect()
            except (OSError, TimeoutError, WireError) as error:
                level = logging.DEBUG if self.attempted.is_set() else logging.WARNING  # warn once
                logger.log(level, "no connection to replica %s: %s", self.info.replica_id, error or "timeout")
                self.attempted.set()
            else:
                self.attempted.set()
                self._listener.on_capacity(self)
                try:
                    await self._heartbeat(connection)
                finally:
                    connection.cut()
                    self._drop(connection)
            # Also after a successful connection: a replica that closes at once must not get each replay first.
            if self._loop.time() - began > self._options.max_reconnect_delay:
                delay = self._options.reconnect_delay
            if self.listed:
                await asyncio.sleep(delay)
                delay = min(2 * delay, self._options.max_reconnect_delay)

    async def _connect(self) -> Connection:
        async with asyncio.timeout(self._options.connect_timeout):
            connection = Connection(send_limit=self._options.send_limit)
            await self._loop.create_connection(lambda: connection, self.info.host, self.info.port)
            try:
                welcome = await prove_as_router(connection, self._secret, self._router_id, self.info)
            except BaseException:
                connection.cut()
                raise
        if connection.closed:
            raise connection.error or WireError("the replica closed the connection after the handshake")
        self.load = welcome.load
        self.draining = welcome.draining
        self._forget_recent()
        self._lost.clear()
        self._heard_at = self._loop.time()
        self._connection = connection
        connection.start(self._receive, lambda error: self._closed(connection, error))
        return connection

    async def _heartbeat(self, connection: Connection) -> None:
        """Returns at the end of the connection, or after a silence of `heartbeat_timeout`."""
        number = 0
        while not self._lost.is_set():
            silence = self._loop.time() - self._heard_at
            if silence > self._options.heartbeat_timeout:
                connection.cut(WireError(f"nothing was heard for {silence:.1f} s"))
                return
            number += 1
            connection.send(Ping(number))
            try:
                async with asyncio.timeout(self._options.heartbeat_interval):
                    await self._lost.wait()
            except TimeoutError:
                continue

    def _closed(self, connection: Connection, error: Exception | None) -> None:
        if not self._stopping:
            logger.warning("lost replica %s: %s", self.info.replica_id, error or "connection closed")
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        """Tells everyone who waits on the connection that it is gone; once."""
        if self._connection is not connection:
            return
        self._connection = None
        self._lost.set()
        self.prefixes.clear()
        calls, self._calls = self._calls, {}
        for _, future in calls.values():
            if not future.done():
                future.set_exception(ReplicaLost(f"replica {self.info.replica_id} is gone"))
        in_flights, self._in_flights = list(self._in_flights.values()), {}
        self._listener.on_lost(self, in_flights)

    # Messages

    def _receive(self, payload: bytes) -> None:
        message = checked(replica_message_decoder, payload)
        self._heard_at = self._loop.time()
        match message:
            case Step(deltas, load):
                self._step(deltas, load)
            case Rejected(rejections):
                for rejection in rejections:
                    in_flight = self._in_flights.pop(rejection.stream, None)
                    if in_flight is not None:
                        self._listener.on_rejected(self, in_flight, from_remote_error(rejection.error))
            case Reply() as reply:
                self._reply(reply)
            case Draining():
                self.draining = True
            case Pong():
                pass

    def _step(self, deltas: list[StreamDelta], load: ReplicaLoad | None) -> None:
        num_ended = 0
        for delta in deltas:
            in_flight = self._in_flights.get(delta.stream)
            if in_flight is None:  # aborted in between
                continue
            if delta.finish_reason is not None:
                num_ended += 1
                in_flight.num_open -= 1
                if not in_flight.num_open:
                    del self._in_flights[delta.stream]
            self._listener.on_delta(self, in_flight, delta, self._heard_at)
        if load is not None:
            self.load = load
            self._forget_recent()
        else:
            self._recent_ends += num_ended
        if num_ended or load is not None:
            self._listener.on_capacity(self)

    def _reply(self, reply: Reply) -> None:
        name, future = self._calls.get(reply.call_id, (None, None))
        if name is not None and future is not None and not future.done():
            if reply.error is not None:
                future.set_exception(from_remote_error(reply.error))
            else:  # a decoding error ends the connection, which fails the call: it is still pending
                future.set_result(decode(bytes(reply.result), CALL_RESULTS[name]))
        self._calls.pop(reply.call_id, None)
