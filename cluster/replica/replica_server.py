"""The TCP server of a replica: receives requests, sends one frame per engine step and router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import msgspec

from ...replicas.errors import CapacityError, EngineError, ServingError
from ...replicas.protocol import BlockReport, ReplicaLoad, Request, TokenDelta
from ..wire.errors import WireError
from ..wire.frames import (
    DEFAULT_SEND_LIMIT,
    Abort,
    Call,
    Connection,
    Draining,
    Ping,
    Pong,
    Rejected,
    Rejection,
    Reply,
    Step,
    StreamDelta,
    Submit,
    SubmitItem,
    checked,
    encode,
    router_message_decoder,
    to_remote_error,
    to_stream_delta,
)
from ..wire.handshake import prove_as_replica, welcome
from ..wire.membership import ReplicaInfo

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class AsyncEngine(Protocol):
    """A running engine; see `replicas/engine/engine_thread.py`."""

    def submit(self, request: Request) -> None:
        """Accept the request, or raise RequestError or CapacityError."""
        ...

    def abort(self, request_id: str, sample: int | None = None) -> None:
        """Abort all samples of the request, or one that has started."""
        ...

    def load(self) -> ReplicaLoad: ...

    def call(self, function: Callable[[Any], _T]) -> Future[_T]:
        """Run `function(engine)` between two steps."""
        ...


@dataclass(frozen=True, slots=True)
class ServerOptions:
    send_limit: int = DEFAULT_SEND_LIMIT  # unsent bytes per router
    load_interval: float = 0.1  # seconds between two load reports to a router
    handshake_timeout: float = 5.0  # seconds
    max_handshakes: int = 64  # concurrent handshakes


@dataclass(eq=False, slots=True)
class _Session:
    """One router's connection, after the handshake."""

    connection: Connection
    router_id: str
    engine_ids: dict[int, str] = field(default_factory=dict)  # stream -> the engine's request id
    reported_load: ReplicaLoad | None = None
    reported_at: float = 0.0


@dataclass(slots=True)
class _Stream:
    session: _Session | None  # None: aborted; the id is in use until the engine's terminal deltas
    stream: int
    num_open: int  # samples without a terminal delta


class ReplicaServer:
    """Serves one engine to many routers. All methods but `publish` run in the event loop's thread."""

    def __init__(self, info: ReplicaInfo, secret: bytes, options: ServerOptions | None = None) -> None:
        self.info = info
        self._secret = secret
        self._options = options or ServerOptions()
        self._engine: AsyncEngine | None = None
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._sessions: set[_Session] = set()
        self._streams: dict[str, _Stream] = {}  # by the engine's request id
        self._handshakes: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self._reporter: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._failed = False

    async def start(self, engine: AsyncEngine) -> ReplicaInfo:
        """Listen on `info.host` and a free port; returns the info with that port."""
        self._engine = engine
        self._server = await self._loop.create_server(
            lambda: Connection(send_limit=self._options.send_limit, on_connected=self._connected),
            self.info.host,
            self.info.port,
        )
        self.info = replace(self.info, port=self._server.sockets[0].getsockname()[1])
        self._reporter = asyncio.create_task(self._report_loads())
        return self.info

    async def close(self) -> None:
        """Stop listening and cut all connections."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._handshakes, *self._calls, *([self._reporter] if self._reporter else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.cut_all()

    def cut_all(self, error: Exception | None = None) -> None:
        """Cut all connections; routers replay their streams."""
        for session in list(self._sessions):
            session.connection.cut(error)

    def fail(self, error: BaseException) -> None:
        """Cut and refuse all connections after an engine failure; routers replay. Idempotent."""
        self._failed = True
        for engine_id in [engine_id for engine_id, entry in self._streams.items() if entry.session is None]:
            self._forget(engine_id)
        if self._server is not None:
            self._server.close()
        self.cut_all(EngineError(f"the engine failed: {error}"))

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def engine(self) -> AsyncEngine:
        assert self._engine is not None, "start() comes first"
        return self._engine

    def start_drain(self) -> None:
        """Accept no more requests; running ones continue."""
        if self.info.draining:
            return
        self.info = replace(self.info, draining=True)
        for session in self._sessions:
            session.connection.send(Draining())

    async def drained(self) -> None:
        """Return after the end of the last stream."""
        await self._idle.wait()

    # Connections

    def _connected(self, connection: Connection) -> None:
        if len(self._handshakes) >= self._options.max_handshakes:
            connection.cut(WireError(f"{len(self._handshakes)} handshakes are in progress"))
            return
        task = asyncio.create_task(self._welcome(connection))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _welcome(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(self._options.handshake_timeout):
                router_id = await prove_as_replica(connection, self._secret, self.info)
        except (WireError, TimeoutError, OSError) as error:
            logger.warning("refused a connection: %s", error or "the handshake took too long")
            connection.cut(error)
            return
        session = _Session(connection, router_id)
        self._sessions.add(session)
        welcome(connection, self.engine.load(), self.info.draining)
        connection.start(
            lambda payload: self._receive(session, payload),
            lambda error: self._closed(session, error),
        )
        if connection.closed:  # it ended before `start`
            self._closed(session, connection.error)

    def _closed(self, session: _Session, error: Exception | None) -> None:
        self._sessions.discard(session)
        if session.engine_ids:
            logger.warning(
                "router %s disconnected (%s); aborting its %d requests",
                session.router_id,
                error or "closed",
                len(session.engine_ids),
            )
        for stream in list(session.engine_ids):
            self._abort(session, stream)

    # Messages

    def _receive(self, session: _Session, payload: bytes) -> None:
        match checked(router_message_decoder, payload):
            case Submit(items):
                self._submit(session, items)
            case Abort(items):
                for item in items:
                    self._abort(session, item.stream, item.sample)
            case Call() as call:
                task = asyncio.create_task(self._call(session, call))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)
            case Ping(number):
                session.connection.send(Pong(number))

    def _submit(self, session: _Session, items: list[SubmitItem]) -> None:
        # Force a load report: the router counts refused requests until the next one.
        session.reported_load = None
        rejections: list[Rejection] = []
        for item in items:
            if item.stream in session.engine_ids:
                raise WireError(f"stream {item.stream} is already in use")
            try:
                self._admit(session, item)
            except EngineError as error:
                self.fail(error)
                return
            except ServingError as error:
                rejections.append(Rejection(item.stream, to_remote_error(error)))
        if rejections:
            session.connection.send(Rejected(rejections))

    def _admit(self, session: _Session, item: SubmitItem) -> None:
        if self.info.draining or self._failed:
            raise CapacityError(f"replica {self.info.replica_id} is draining; another one will run the request")
        engine_id = self._engine_id(item.request.request_id)
        request = replace(item.request, request_id=engine_id)
        # The first delta may be published before submit returns.
        self._streams[engine_id] = _Stream(session, item.stream, request.num_samples)
        try:
            self.engine.submit(request)
        except ServingError:
            del self._streams[engine_id]
            raise
        session.engine_ids[item.stream] = engine_id
        self._idle.clear()

    def _engine_id(self, request_id: str) -> str:
        """`request_id`, with a number if another router or an aborted stream still uses it."""
        engine_id, number = request_id, 1
        while engine_id in self._streams:
            number += 1
            engine_id = f"{request_id}#{number}"
        return engine_id

    def _abort(self, session: _Session, stream: int, sample: int | None = None) -> None:
        """Abort a stream, or one sample of it, which still gets a terminal delta."""
        engine_id = session.engine_ids.get(stream)
        if engine_id is None:
            return
        if sample is not None:
            self.engine.abort(engine_id, sample)
            return
        del session.engine_ids[stream]
        if self._failed:  # the engine will not report its end
            self._forget(engine_id)
            return
        self._streams[engine_id].session = None
        self.engine.abort(engine_id)

    def _forget(self, engine_id: str) -> None:
        del self._streams[engine_id]
        if not self._streams:
            self._idle.set()

    async def _call(self, session: _Session, call: Call) -> None:
        try:
            result = await self._answer(call)
        except ServingError as error:
            session.connection.send(Reply(call.call_id, msgspec.Raw(encode(None)), to_remote_error(error)))
        else:
            session.connection.send(Reply(call.call_id, msgspec.Raw(encode(result))))

    async def _answer(self, call: Call) -> ReplicaLoad | dict[str, BlockReport] | bool | None:
        match call.name:
            case "load":
                return self.engine.load()
            case "block_reports":
                return await asyncio.wrap_future(self.engine.call(lambda engine: engine.block_reports()))
            case "reset_prefix_cache":
                return await asyncio.wrap_future(self.engine.call(lambda engine: engine.reset_prefix_cache()))
            case "drain":
                self.start_drain()
                return None

    # Steps

    def publish(self, deltas: list[TokenDelta]) -> None:
        """Send one step's deltas to their routers. Thread-safe; returns at once."""
        self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: Sequence[TokenDelta]) -> None:
        if self._failed:
            return
        by_session: dict[_Session, list[StreamDelta]] = {}
        for delta in deltas:
            entry = self._streams.get(delta.request_id)
            if entry is None:
                continue
            if entry.session is not None:
                by_session.setdefault(entry.session, []).append(to_stream_delta(entry.stream, delta))
            if delta.finish_reason is not None:
                entry.num_open -= 1
                if not entry.num_open:
                    if entry.session is not None:
                        del entry.session.engine_ids[entry.stream]
                    self._forget(delta.request_id)
        now = self._loop.time()
        for session, stream_deltas in by_session.items():
            session.connection.send(Step(stream_deltas, self._load_for(session, now)))

    def _load_for(self, session: _Session, now: float) -> ReplicaLoad | None:
        """The load, if a report to the router is due."""
        if now - session.reported_at < self._options.load_interval:
            return None
        session.reported_at = now
        session.reported_load = self.engine.load()
        return session.reported_load

    async def _report_loads(self) -> None:
        """Report changed loads to routers that receive no steps."""
        while True:
            await asyncio.sleep(self._options.load_interval)
            now = self._loop.time()
            for session in list(self._sessions):
                reported_load = session.reported_load
                load = self._load_for(session, now)
                if load is not None and load != reported_load:
                    session.connection.send(Step([], load))
