"""Messages and frames between routers and replicas.

A frame is a length (4 bytes, big-endian) and a msgpack message: an array that starts with the message's tag.
Many requests share one connection. Each is a `stream`: a number that the router never reuses on it.
One `Step` carries all tokens of an engine step for one router. Nothing is pickled.

    router                      replica
    Hello            ->
                     <-         Challenge      (see handshake.py)
    Proof            ->
                     <-         Welcome
    Submit, Abort    ->
    Call, Ping       ->
                     <-         Rejected, Step, Reply, Pong, Draining
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar, cast

import msgspec

from ...replicas.errors import CapacityError, EngineError, PromptTooLong, RequestError, ServingError, UnknownModel
from ...replicas.protocol import BlockReport, FinishReason, Logprob, ReplicaLoad, Request, TokenDelta
from .errors import WireError

VERSION = 1
MAX_FRAME_BYTES = 64 << 20  # prompt logprobs of 128k tokens with 20 alternatives: about 40 MB
MAX_HANDSHAKE_FRAME_BYTES = 4096  # before the peer has proved itself
DEFAULT_SEND_LIMIT = 64 << 20  # unsent bytes
_MAX_HANDSHAKE_FRAMES = 8  # unread ones; a correct peer sends two
_HEADER_BYTES = 4


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages."""


class Hello(Message, frozen=True, tag=1):
    version: int
    router_id: str
    replica_id: str
    epoch: int
    host: str  # the dialled address; the replica refuses any but its own
    port: int
    nonce: bytes


class Challenge(Message, frozen=True, tag=2):
    version: int
    nonce: bytes
    proof: bytes


class Proof(Message, frozen=True, tag=3):
    proof: bytes


class Welcome(Message, frozen=True, tag=4):
    load: ReplicaLoad
    draining: bool


class SubmitItem(msgspec.Struct, frozen=True, array_like=True):
    stream: int
    request: Request


class Submit(Message, frozen=True, tag=5):
    items: list[SubmitItem]


class AbortItem(msgspec.Struct, frozen=True, array_like=True):
    stream: int
    sample: int | None = None  # None: all samples of the stream


class Abort(Message, frozen=True, tag=6):
    items: list[AbortItem]


CallName = Literal["load", "block_reports", "reset_prefix_cache", "drain"]
CALL_RESULTS: dict[str, object] = {
    "load": ReplicaLoad,
    "block_reports": dict[str, BlockReport],
    "reset_prefix_cache": bool,
    "drain": None,
}


class Call(Message, frozen=True, tag=7):
    call_id: int
    name: CallName


class Ping(Message, frozen=True, tag=8):
    number: int


class RemoteError(msgspec.Struct, frozen=True, array_like=True):
    """A ServingError on the wire: class name and fields."""

    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float = 1.0


class Rejection(msgspec.Struct, frozen=True, array_like=True):
    stream: int
    error: RemoteError


class Rejected(Message, frozen=True, tag=9):
    """Streams that the engine refused. A stream's first `Step` implies acceptance."""

    rejections: list[Rejection]


class StreamDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A TokenDelta with a stream in place of the request id: about 11 bytes per plain token."""

    stream: int
    sample: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[Logprob, ...] | None = None
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    error: str | None = None


class Step(Message, frozen=True, tag=10):
    deltas: list[StreamDelta]
    load: ReplicaLoad | None = None


class Reply(Message, frozen=True, tag=11):
    call_id: int
    result: msgspec.Raw
    error: RemoteError | None = None


class Pong(Message, frozen=True, tag=12):
    number: int


class Draining(Message, frozen=True, tag=13):
    """The replica accepts no more requests; running ones continue."""


RouterMessage = Submit | Abort | Call | Ping
ReplicaMessage = Rejected | Step | Reply | Pong | Draining

_M = TypeVar("_M")
_encoder = msgspec.msgpack.Encoder()
router_message_decoder: msgspec.msgpack.Decoder[RouterMessage] = msgspec.msgpack.Decoder(RouterMessage)
replica_message_decoder: msgspec.msgpack.Decoder[ReplicaMessage] = msgspec.msgpack.Decoder(ReplicaMessage)


def encode(message: object) -> bytes:
    """msgpack of a message or a call's result."""
    return _encoder.encode(message)


def decode(payload: bytes, type_: type[_M] | object) -> _M:
    """Decode a value of `type_`; raises WireError for anything else."""
    return checked(msgspec.msgpack.Decoder(cast("type[_M]", type_)), payload)


def checked(decoder: msgspec.msgpack.Decoder[_M], payload: bytes) -> _M:
    """`decoder.decode`, with WireError as the only error."""
    try:
        return decoder.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"a frame of {len(payload)} bytes is not a message of protocol {VERSION}: {error}") from error


def to_stream_delta(stream: int, delta: TokenDelta) -> StreamDelta:
    return StreamDelta(
        stream,
        delta.sample,
        delta.token_ids,
        delta.finish_reason,
        delta.stop_reason,
        delta.num_cached_tokens,
        delta.logprobs,
        delta.prompt_logprobs,
        delta.error,
    )


_ERROR_KINDS: dict[str, type[ServingError]] = {
    kind.__name__: kind for kind in (RequestError, PromptTooLong, UnknownModel, CapacityError, EngineError)
}


def to_remote_error(error: ServingError) -> RemoteError:
    """Encode an error as its nearest base class of `_ERROR_KINDS`."""
    kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in _ERROR_KINDS), EngineError.__name__)
    return RemoteError(
        kind,
        error.message,
        getattr(error, "param", None),
        getattr(error, "code", None),
        getattr(error, "retry_after", 1.0),
    )


def from_remote_error(error: RemoteError) -> ServingError:
    kind = _ERROR_KINDS.get(error.kind, EngineError)
    if issubclass(kind, RequestError):
        return kind(error.message, param=error.param, code=error.code)
    if issubclass(kind, CapacityError):
        return kind(error.message, retry_after=error.retry_after)
    return kind(error.message)


class FrameSplitter:
    """Splits a byte stream into payloads of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield each completed payload; raises WireError at a header above the limit."""
        rest = self._rest
        rest += data
        start = 0
        try:
            while len(rest) - start >= _HEADER_BYTES:
                begin = start + _HEADER_BYTES
                size = int.from_bytes(rest[start:begin], "big")
                if size > self.limit:
                    raise WireError(f"a frame of {size} bytes is above the limit of {self.limit}")
                if len(rest) < begin + size:
                    return
                start = begin + size
                yield bytes(rest[begin:start])
        finally:
            del rest[:start]


class Connection(asyncio.Protocol):
    """One end of a connection, with a limit on the bytes queued for a slow reader.

    `next_frame` reads the frames before `start`, the receiver gets those after it. Its WireError closes the
    connection. `on_closed` is called once.
    """

    def __init__(
        self, *, send_limit: int = DEFAULT_SEND_LIMIT, on_connected: Callable[[Connection], None] | None = None
    ) -> None:
        self._send_limit = send_limit
        self._on_connected = on_connected
        self._splitter = FrameSplitter(MAX_HANDSHAKE_FRAME_BYTES)
        self._early: deque[bytes] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._receiver: Callable[[bytes], None] | None = None
        self._on_closed: Callable[[Exception | None], None] | None = None
        self._transport: asyncio.Transport | None = None
        self.closed = False
        self.error: Exception | None = None

    def start(self, receiver: Callable[[bytes], None], on_closed: Callable[[Exception | None], None]) -> None:
        """End the handshake: `receiver` gets all further frames."""
        self._splitter.limit = MAX_FRAME_BYTES
        self._receiver = receiver
        self._on_closed = on_closed
        try:
            while self._early and not self.closed:
                receiver(self._early.popleft())
        except WireError as error:
            self.cut(error)

    async def next_frame(self) -> bytes:
        """The next frame before `start`; raises WireError if the connection ends first."""
        while not self._early:
            if self.closed:
                raise self.error or WireError("the peer closed the connection")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._early.popleft()

    def send(self, message: object) -> None:
        """Queue one frame; cuts the connection above `send_limit`."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        payload = _encoder.encode(message)
        transport.write(len(payload).to_bytes(_HEADER_BYTES, "big") + payload)
        waiting = transport.get_write_buffer_size()
        if waiting > self._send_limit:
            self.cut(WireError(f"the peer reads too slowly: {waiting} bytes wait for it, above {self._send_limit}"))

    def cut(self, error: Exception | None = None) -> None:
        """Close at once and drop queued frames."""
        if self.error is None:
            self.error = error
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._on_connected is not None:
            self._on_connected(self)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._splitter.feed(data):
                self._receive(payload)
                if self.error is not None:
                    return
        except WireError as error:
            self.cut(error)

    def _receive(self, payload: bytes) -> None:
        if self._receiver is not None:
            self._receiver(payload)
            return
        if len(self._early) >= _MAX_HANDSHAKE_FRAMES:
            raise WireError(f"more than {_MAX_HANDSHAKE_FRAMES} frames came before the end of the handshake")
        self._early.append(payload)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self.error is None:
            self.error = exc
        self._wake()
        if self._on_closed is not None:
            self._on_closed(self.error)
