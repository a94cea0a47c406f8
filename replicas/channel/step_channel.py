"""Step plans from an engine to the ranks of its shard group over sockets, and results back.

    engine:  server = StepChannelServer(world_size, token)     rank:  client = StepChannelClient(server.path, rank, ...)
             server.accept(timeout_s)                                 while (plan := client.receive()) is not None:
             server.submit(plan); server.result()                         client.send_result(...)

Every rank receives every plan, and only the rank that samples answers: collectives keep the ranks in step.
Ranks on the engine's node connect by UNIX socket, others by TCP. When a rank dies, the engine's current or next
call sees end-of-file. A failed channel stays failed, since the ranks are out of step.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from ..errors import EngineError
from ..plan import StepPlan, StepResult
from .step_frames import HEADER_BYTES, EndOfSteps, Frame, FrameError, StepFailure, decode, encode, frame_length
from .step_handshake import introduce
from .step_sockets import SEND_FLAGS, Address, ChannelClosed, Listener, connect

_STAGING_BYTES = 1 << 16  # a decode plan of 2,700 sequences
_SILENCE_MS = 1000


class PeerLost(EngineError):
    """The connection to the peer ended during work."""


class _FrameReader:
    """Splits a stream into frames, each in its own buffer, so that views on it stay valid."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._begin = self._end = 0  # of the bytes not yet returned
        self._large: memoryview | None = None  # larger than the staging buffer; holds `_end` bytes

    def fill(self, flags: int = 0) -> None:
        """Receive once. Raises EOFError."""
        into = self._staging if self._large is None else self._large
        count = self._sock.recv_into(into[self._end :], 0, flags)
        if not count:
            raise EOFError
        self._end += count

    def next(self) -> Frame | None:
        """The next frame, or None if it is incomplete. Raises FrameError."""
        if self._large is not None:
            if self._end < len(self._large):
                return None
            frame, self._large, self._end = self._large, None, 0
            return frame
        held = self._end - self._begin
        if held < HEADER_BYTES:
            self._move_to_front()
            return None
        length = frame_length(self._staging[self._begin : self._end])
        if held >= length:
            frame = bytearray(self._staging[self._begin : self._begin + length])
            self._begin += length
            if self._begin == self._end:
                self._begin = self._end = 0
            return frame
        self._move_to_front()
        if length > len(self._staging):
            self._large = memoryview(
                np.empty(length, np.uint8).data
            )  # pages are allocated as bytes arrive, not as claimed
            self._large[:held] = self._staging[:held]
        return None

    def _move_to_front(self) -> None:
        held = self._end - self._begin
        if self._begin:
            self._staging[:held] = bytes(self._staging[self._begin : self._end])
            self._begin, self._end = 0, held


class _Rank:
    """The engine's end of one rank's connection."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank, self.sock = rank, sock
        self.reader = _FrameReader(sock)
        self.unsent = memoryview(b"")

    def send(self, frame: memoryview) -> bool:
        """Send without blocking; whether the whole frame went out."""
        try:
            self.unsent = frame[self.sock.send(frame, SEND_FLAGS) :]
        except BlockingIOError:
            self.unsent = frame
        return not self.unsent


class StepChannelServer:
    """The engine's side: carries plans and results as `Executor` does.

    One thread submits and collects; any thread may close. `host`: ranks may also connect by
    TCP, on a port that the system chooses. on_silence: called once a second while a call waits;
    its EngineError fails the channel.
    """

    def __init__(self, world_size: int, token: bytes, *, result_rank: int = 0, host: str | None = None) -> None:
        if not 0 <= result_rank < world_size:
            raise ValueError(f"result_rank {result_rank} is not one of the {world_size} ranks 0 to {world_size - 1}")
        if not token:
            raise ValueError("the token is empty; give the group a random one")
        self._world_size, self._token, self._result_rank = world_size, token, result_rank
        self._listener = Listener(host)
        self.path, self.address = self._listener.path, self._listener.address
        self._lock = threading.Lock()
        self._closing = threading.Lock()  # taken for good by the first close
        self._wake, self._waker = socket.socketpair()  # readable once closing
        self._broken: EngineError | None = None
        self._ranks: list[_Rank] = []
        self._by_fd: dict[int, _Rank] = {}
        self._poll = select.poll()
        self._in_flight: deque[int] = deque()
        self._results: deque[StepResult] = deque()

    def accept(self, timeout_s: float) -> None:
        """Wait until every rank has connected and authenticated.

        Raises EngineError after `timeout_s`, naming the missing ranks and the refused
        peers.
        """
        with self._lock:
            self._check_usable()
            if self._ranks:
                raise EngineError(f"all {self._world_size} ranks have been accepted already")
            socks = self._listener.accept(self._world_size, self._token, timeout_s, self._wake)
            self._listener.close()
            self._ranks = [_Rank(rank, sock) for rank, sock in enumerate(socks)]
            self._by_fd = {peer.sock.fileno(): peer for peer in self._ranks}
            for sock in (self._wake, *socks):
                self._poll.register(sock, select.POLLIN)

    def submit(self, plan: StepPlan, on_silence: Callable[[], None] | None = None) -> None:
        """Send a plan to every rank; returns when the sockets have accepted it.

        Raises FrameError for a plan that cannot be written, PeerLost, ChannelClosed.
        """
        with self._lock:
            self._check_usable()
            if not self._ranks:
                raise EngineError(f"no rank of {self._world_size} is connected; accept() them before the first plan")
            frame = memoryview(encode(plan))
            self._in_flight.append(plan.step)
            waiting = False
            for peer in self._ranks:
                try:
                    sent = peer.send(frame)
                except OSError as error:
                    raise self._lost(peer, error) from error
                if not sent:
                    waiting = True
                    self._poll.modify(peer.sock, select.POLLIN | select.POLLOUT)
            # Read results meanwhile: a rank that blocks on sending a large one receives no plan.
            while waiting:
                self._wait(on_silence)
                waiting = any(peer.unsent for peer in self._ranks)

    def result(self, on_silence: Callable[[], None] | None = None) -> StepResult:
        """Wait for the result of the oldest unanswered plan.

        Raises EngineError for a rank's failure, PeerLost, ChannelClosed.
        """
        with self._lock:
            self._check_usable()
            if not self._results and not self._in_flight:
                raise EngineError("no plan is in flight, so no result can come; submit one first")
            while not self._results:
                self._wait(on_silence)
            return self._results.popleft()

    def close(self) -> None:
        """Send EndOfSteps to the ranks, and close. A waiting thread gets ChannelClosed."""
        if not self._closing.acquire(blocking=False):
            return
        self._waker.send(b"\0")
        with self._lock:
            end = memoryview(encode(EndOfSteps()))
            for peer in self._ranks:
                if not peer.unsent:  # else the rank would read it as the rest of a plan
                    with contextlib.suppress(OSError):
                        peer.send(end)
                peer.sock.close()
            self._listener.close()
            self._wake.close()
            self._waker.close()

    def _check_usable(self) -> None:
        if self._closing.locked():
            raise ChannelClosed("the step channel is closed")
        if self._broken is not None:
            raise self._broken

    def _wait(self, on_silence: Callable[[], None] | None) -> None:
        """Wait at most a second for ready sockets, and serve them."""
        ready = self._poll.poll(_SILENCE_MS)
        try:
            if not ready and on_silence is not None:
                on_silence()
            for fd, events in ready:
                peer = self._by_fd.get(fd)
                if peer is None:
                    raise ChannelClosed("the step channel was closed while the engine waited for its shards")
                self._exchange(peer, events)
        except EngineError as error:
            self._broken = error
            raise

    def _exchange(self, peer: _Rank, events: int) -> None:
        try:
            if events & select.POLLOUT and peer.send(peer.unsent):
                self._poll.modify(peer.sock, select.POLLIN)
            if events & ~select.POLLOUT:
                self._read(peer)
        except BlockingIOError:
            return
        except (EOFError, OSError) as error:
            raise self._lost(peer, error) from error

    def _read(self, peer: _Rank) -> None:
        peer.reader.fill(socket.MSG_DONTWAIT)
        while (frame := peer.reader.next()) is not None:
            message = decode(frame)
            if isinstance(message, StepFailure):
                raise EngineError(f"step {message.step} failed on rank {peer.rank}: {message.message}")
            what = f"rank {peer.rank} sent a {type(message).__name__}"
            if not isinstance(message, StepResult) or peer.rank != self._result_rank:
                raise FrameError(f"{what}; only rank {self._result_rank} answers, and with results")
            if not self._in_flight or message.step != self._in_flight[0]:
                raise FrameError(f"{what} of step {message.step}; steps in flight: {list(self._in_flight)}")
            self._in_flight.popleft()
            self._results.append(message)

    def _lost(self, peer: _Rank, error: Exception) -> EngineError:
        """The failure that a lost rank reported last, if any: it is the cause."""
        try:
            while True:
                self._read(peer)
        except (EOFError, OSError):
            steps = f"steps in flight: {list(self._in_flight)}"
            self._broken = PeerLost(f"rank {peer.rank} of {self._world_size} is gone ({_reason(error)}); {steps}")
        except EngineError as reported:
            self._broken = reported
        return self._broken


class StepChannelClient:
    """A rank's side. One thread receives, any one sends; any thread may close.

    address: the server's `path` or `address`. Raises ChannelRefused, or EngineError when the
    engine is unreachable or silent for `timeout_s`.
    """

    def __init__(self, address: Address, rank: int, world_size: int, token: bytes, *, timeout_s: float = 30.0) -> None:
        self._rank = rank
        self._closing = threading.Lock()  # taken for good by the first close
        self._receiving, self._sending = threading.Lock(), threading.Lock()
        self._step: int | None = None
        self._ended = False
        try:
            self._sock = connect(address, timeout_s)
        except OSError as error:
            raise EngineError(
                f"rank {rank} cannot reach its engine at {address}: {error}; look at the engine's log and, between "
                "nodes, at routes and firewalls"
            ) from error
        try:
            introduce(self._sock, rank, world_size, token)
            self._sock.settimeout(None)
        except OSError as error:
            self._sock.close()
            raise EngineError(f"rank {rank} got no answer from its engine at {address}: {error}") from error
        except BaseException:
            self._sock.close()
            raise
        self._reader = _FrameReader(self._sock)

    def receive(self) -> StepPlan | None:
        """The next plan, or None after EndOfSteps.

        Raises PeerLost, ChannelClosed, FrameError for anything but the next step's plan.
        """
        with self._receiving:
            if self._ended:
                return None
            try:
                while (frame := self._reader.next()) is None:
                    self._reader.fill()
            except (EOFError, OSError) as error:
                raise self._lost(error) from error
            message = decode(frame)
            if isinstance(message, EndOfSteps):
                self._ended = True
                return None
            if not isinstance(message, StepPlan):
                raise FrameError(f"the engine sent rank {self._rank} a {type(message).__name__}, not a plan")
            if self._step is not None and message.step != self._step + 1:
                raise FrameError(f"rank {self._rank} was sent step {message.step} after step {self._step}")
            self._step = message.step
            return message

    def wait_for_hang_up(self) -> None:
        """Wait until either end has closed; reads nothing."""
        poll = select.poll()
        with contextlib.suppress(ValueError):  # closed already
            poll.register(self._sock, select.POLLRDHUP)
            poll.poll()

    def send_result(self, result: StepResult) -> None:
        """Answer the oldest unanswered plan. Raises FrameError, PeerLost, ChannelClosed."""
        self._send(result)

    def send_failure(self, step: int, message: str) -> None:
        """Report a failed step, from any rank; the engine's next call raises it. Raises as `send_result`."""
        self._send(StepFailure(step, message))

    def close(self) -> None:
        """Close. A waiting thread gets ChannelClosed."""
        if not self._closing.acquire(blocking=False):
            return
        with contextlib.suppress(OSError):  # the engine may have closed
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._receiving, self._sending:
            self._sock.close()

    def _send(self, message: StepResult | StepFailure) -> None:
        with self._sending:
            try:
                self._sock.sendall(encode(message), socket.MSG_NOSIGNAL)
            except OSError as error:
                raise self._lost(error) from error

    def _lost(self, error: Exception) -> EngineError:
        if self._closing.locked():
            return ChannelClosed(f"the step channel of rank {self._rank} is closed")
        return PeerLost(f"the engine of rank {self._rank} is gone ({_reason(error)}); last step received: {self._step}")


def _reason(error: Exception) -> str:
    return "it hung up" if isinstance(error, EOFError) else str(error)
