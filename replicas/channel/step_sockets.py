"""The sockets of a step channel: where it listens, which connections it accepts, and how they are set up."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time

from ..errors import EngineError
from . import step_handshake
from .step_handshake import ChannelRefused

Address = str | tuple[str, int]  # the path of a UNIX socket (one that begins with @ is abstract), or host and port

SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_UNIX_BUFFER_BYTES = 1 << 20  # the kernel may grant less (net.core.wmem_max)
_PEER = struct.Struct("3i")  # Linux's ucred: process, user, group
# A host that dies, or a link that is cut, sends no end-of-file. It is noticed after 8 s without an answer, either to
# what was sent or, where nothing was, to the probes that the kernel sends from the second second of silence on.
_USER_TIMEOUT_MS = 8_000
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


class ChannelClosed(EngineError):
    """This end of the channel was closed."""


class Listener:
    """Where the ranks of a group connect: a UNIX socket, for processes of this user, and TCP where `host` is given.

    The UNIX socket is abstract: the kernel names it and forgets it with the process, and no folder or file is left
    where that is killed. The system chooses the port. path, address: what ranks connect to. Raises OSError for a host
    that is no address of this machine.
    """

    def __init__(self, host: str | None) -> None:
        self._socks: list[socket.socket] = []
        self.address: tuple[str, int] | None = None
        try:
            self.path = "@" + self._open(socket.AF_UNIX, "").getsockname()[1:].decode()
            if host is not None:
                family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
                self.address = (host, self._open(family, (host, 0)).getsockname()[1])
        except BaseException:
            self.close()
            raise

    def _open(self, family: int, address: Address) -> socket.socket:
        sock = socket.socket(family)
        self._socks.append(sock)
        sock.setblocking(False)  # who connected may be gone when we accept
        sock.bind(address)
        sock.listen()
        return sock

    def close(self) -> None:
        """Stop listening. May be called again."""
        while self._socks:
            self._socks.pop().close()

    def accept(self, world_size: int, token: bytes, timeout_s: float, wake: socket.socket) -> list[socket.socket]:
        """The connections of ranks 0 .. world_size - 1, when all have come and proved themselves.

        Handshakes go on side by side: one who says nothing keeps nobody else waiting. Raises EngineError after
        `timeout_s`, naming the missing ranks and who was refused, and ChannelClosed as soon as `wake` is readable.
        """
        deadline = time.monotonic() + timeout_s
        came: dict[int, socket.socket] = {}
        refused: list[str] = []
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as unfinished:
            selector.register(wake, selectors.EVENT_READ)
            for sock in self._socks:
                selector.register(sock, selectors.EVENT_READ, sock)
            while len(came) < world_size:
                left_s = deadline - time.monotonic()
                ready = selector.select(max(0.0, left_s))
                if not ready or left_s <= 0:
                    missing = sorted(set(range(world_size)) - set(came))
                    raise EngineError(
                        f"ranks {missing} of {world_size} have not connected within {timeout_s:.1f} s; "
                        f"refused: {refused or 'nobody'}"
                    )
                for key, _ in ready:
                    if key.data is None:
                        raise ChannelClosed("the step channel was closed while it waited for its ranks")
                    if isinstance(key.data, socket.socket):
                        with contextlib.suppress(OSError):
                            handshake = _Handshake(key.data.accept()[0])
                            unfinished.callback(handshake.sock.close)
                            selector.register(handshake.sock, selectors.EVENT_READ, handshake)
                        continue
                    try:
                        rank = key.data.go_on(token, world_size, came)
                    except (ChannelRefused, OSError) as error:
                        refused.append(str(error))
                        selector.unregister(key.data.sock)
                        key.data.sock.close()
                        continue
                    if rank is not None:
                        selector.unregister(key.data.sock)
                        came[rank] = key.data.sock
            # All are here: those are kept, and whatever else has connected is closed.
            return [came[rank].dup() for rank in range(world_size)]


class _Handshake:
    """That of one connection, as far as it has come."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._nonce = step_handshake.new_nonce()
        self._hello = bytearray()
        _configure(sock)
        with contextlib.suppress(OSError):  # who is gone already is noticed when it is read
            sock.send(step_handshake.challenge(self._nonce), SEND_FLAGS)

    def go_on(self, token: bytes, world_size: int, taken: dict[int, socket.socket]) -> int | None:
        """Read on; the rank once it has been welcomed.

        Raises OSError, or ChannelRefused; why, is told to processes of this user.
        """
        self._check_user()
        data = self.sock.recv(step_handshake.HELLO_BYTES - len(self._hello), socket.MSG_DONTWAIT)
        if not data:
            raise ConnectionError(f"a connection ended after {len(self._hello)} bytes of its handshake")
        self._hello += data
        if len(self._hello) < step_handshake.HELLO_BYTES:
            return None
        try:
            greeting = step_handshake.verify(self._hello, self._nonce, token, world_size)
            if greeting.rank in taken:
                raise ChannelRefused(f"rank {greeting.rank} is connected already")
        except ChannelRefused as error:
            self.sock.send(step_handshake.refusal(str(error)), SEND_FLAGS)
            raise
        self.sock.send(greeting.welcome, SEND_FLAGS)
        return greeting.rank

    def _check_user(self) -> None:
        if self.sock.family == socket.AF_UNIX:
            process, user, _ = _PEER.unpack(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
            if user != os.geteuid():
                raise ChannelRefused(f"process {process} is user {user}'s")


def connect(address: Address, timeout_s: float) -> socket.socket:
    """A connection to a listener, with that timeout on it. Raises OSError."""
    sock = None
    try:
        if isinstance(address, str):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(timeout_s)
            sock.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        else:
            sock = socket.create_connection(address, timeout_s)
        _configure(sock)
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return sock


def _configure(sock: socket.socket) -> None:
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER_BYTES)
        return
    # No SO_SNDBUF: the kernel sizes TCP's buffers by the connection, and larger than a fixed size that it is given.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
