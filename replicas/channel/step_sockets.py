"""The sockets of a step channel: listening, accepting ranks, connecting."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Container
from functools import partial
from typing import Self

from ..errors import EngineError
from . import step_handshake
from .handshake import Handshake, Role
from .step_handshake import ChannelRefused

Address = str | tuple[str, int]  # the path of a UNIX socket (abstract: @...), or host and port

SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_UNIX_BUFFER_BYTES = 1 << 20  # the kernel may grant less (net.core.wmem_max)
_PEER = struct.Struct("3i")  # Linux's ucred: process, user, group
# A dead host or a cut cable sends no end-of-file. TCP reports it after 8 s without an
# acknowledgement, and probes an idle connection after 2 s.
_USER_TIMEOUT_MS = 8_000
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 2), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3))


class ChannelClosed(EngineError):
    """This end of the channel was closed."""


class Listener:
    """Listening sockets for the ranks of a group: UNIX for processes of this user, and TCP if
    `host` is given.

    The UNIX socket is abstract, so that a killed process leaves no file. path, address: where
    ranks connect.

    Raises OSError if `host` is not an address of this machine.
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
        sock.setblocking(False)  # a peer may be gone before accept
        sock.bind(address)
        sock.listen()
        return sock

    def close(self) -> None:
        """Stop listening. May be called again."""
        while self._socks:
            self._socks.pop().close()

    def accept(self, world_size: int, token: bytes, timeout_s: float, wake: socket.socket) -> list[socket.socket]:
        """The connections of ranks 0 .. world_size - 1, once all have proved themselves.

        Raises EngineError after `timeout_s`, with the missing ranks and the refusals'
        reasons, and ChannelClosed once `wake` is readable.
        """
        with _Admission(self._socks, world_size, token, wake) as admission:
            return admission.run(timeout_s)


class _Admission:
    """Authenticates the ranks of one group side by side: a silent peer delays no other."""

    def __init__(self, listening: list[socket.socket], world_size: int, token: bytes, wake: socket.socket) -> None:
        self._world_size = world_size
        self._token = token
        self._admitted: dict[int, socket.socket] = {}
        self._refused: list[str] = []
        self._accepted = contextlib.ExitStack()  # of every accepted socket
        self._selector = selectors.DefaultSelector()  # a key's data handles its socket
        self._selector.register(wake, selectors.EVENT_READ, self._stop)
        for sock in listening:
            self._selector.register(sock, selectors.EVENT_READ, partial(self._accept, sock))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._accepted.close()

    def run(self, timeout_s: float) -> list[socket.socket]:
        deadline = time.monotonic() + timeout_s
        while len(self._admitted) < self._world_size:
            left_s = deadline - time.monotonic()
            ready = self._selector.select(max(0.0, left_s))
            if not ready or left_s <= 0:
                missing = sorted(set(range(self._world_size)) - set(self._admitted))
                raise EngineError(
                    f"ranks {missing} of {self._world_size} have not connected within {timeout_s:.1f} s; "
                    f"refused: {self._refused or 'none'}"
                )
            for key, _ in ready:
                key.data()
        return [self._admitted[rank].dup() for rank in range(self._world_size)]

    def _stop(self) -> None:
        raise ChannelClosed("the step channel was closed while it waited for its ranks")

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock = self._accepted.enter_context(listening.accept()[0])
            greeter = _Greeter(sock, self._token, self._world_size)
            self._selector.register(sock, selectors.EVENT_READ, partial(self._read, greeter))

    def _read(self, greeter: _Greeter) -> None:
        try:
            rank = greeter.read(self._admitted)
        except (ChannelRefused, OSError) as error:
            self._refused.append(str(error))
            self._selector.unregister(greeter.sock)
            greeter.sock.close()
            return
        if rank is not None:
            self._selector.unregister(greeter.sock)
            self._admitted[rank] = greeter.sock


class _Greeter:
    """The engine's side of one handshake, read piece by piece."""

    def __init__(self, sock: socket.socket, token: bytes, world_size: int) -> None:
        self.sock = sock
        self._world_size = world_size
        self._handshake = Handshake(Role.ENGINE, token)
        self._hello = bytearray()
        _configure(sock)
        with contextlib.suppress(OSError):  # the next read notices a peer that has gone
            sock.send(step_handshake.challenge(self._handshake.nonce), SEND_FLAGS)

    def read(self, admitted: Container[int]) -> int | None:
        """The rank, once it is welcomed.

        Raises OSError or ChannelRefused. Only processes of this user receive the reason.
        """
        self._check_user()
        data = self.sock.recv(step_handshake.HELLO_BYTES - len(self._hello), socket.MSG_DONTWAIT)
        if not data:
            raise ConnectionError(f"a connection ended after {len(self._hello)} bytes of its handshake")
        self._hello += data
        if len(self._hello) < step_handshake.HELLO_BYTES:
            return None
        try:
            greeting = step_handshake.verify(self._hello, self._handshake, self._world_size)
            if greeting.rank in admitted:
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
                raise ChannelRefused(f"process {process} belongs to user {user}")


def connect(address: Address, timeout_s: float) -> socket.socket:
    """Connect to a listener; the socket keeps the timeout. Raises OSError."""
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
    # No SO_SNDBUF: the kernel tunes TCP buffers to larger sizes than a fixed one may have.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
