"""Which peers a step channel admits, and the options of its sockets."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.replicas.channel import step_handshake as handshake
from shoal.replicas.channel import step_sockets
from shoal.replicas.channel.handshake import NONCE_BYTES
from shoal.replicas.channel.step_channel import ChannelClosed, StepChannelClient, StepChannelServer
from shoal.replicas.channel.step_frames import VERSION
from shoal.replicas.channel.step_handshake import ChannelRefused
from shoal.replicas.errors import EngineError
from tests.support.step_group import TOKEN, Group, run_in_thread


@pytest.fixture
def server() -> Iterator[StepChannelServer]:
    with contextlib.closing(StepChannelServer(1, TOKEN, host="127.0.0.1")) as made:
        yield made


@pytest.mark.parametrize(
    ("rank", "world_size", "token", "reason"),
    [
        (0, 1, secrets.token_bytes(32), "rank 0 does not hold this group's token"),
        (0, 4, TOKEN, "rank 0 expects 4 ranks, the engine has 1"),
        (1, 1, TOKEN, "rank 1 is not one of the 1 ranks"),
        (-1, 1, TOKEN, "rank -1 is not one of the 1 ranks"),
    ],
)
def test_a_refused_shard_receives_the_reason(
    server: StepChannelServer, rank: int, world_size: int, token: bytes, reason: str
) -> None:
    accepting = run_in_thread(server.accept, 30)
    with pytest.raises(ChannelRefused, match=f"refuses rank {rank}: .*{reason}"):
        StepChannelClient(server.path, rank, world_size, token)
    StepChannelClient(server.path, 0, 1, TOKEN).close()  # and the right one is let in after it
    accepting.result(30)


def test_a_rank_is_let_in_once() -> None:
    server = StepChannelServer(2, TOKEN)
    accepting = run_in_thread(server.accept, 30)
    first = StepChannelClient(server.path, 1, 2, TOKEN)
    with pytest.raises(ChannelRefused, match="rank 1 is connected already"):
        StepChannelClient(server.path, 1, 2, TOKEN)
    StepChannelClient(server.path, 0, 2, TOKEN).close()
    accepting.result(30)
    first.close()
    server.close()


def test_a_shard_of_another_version_is_refused(server: StepChannelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    accepting = run_in_thread(server.accept, 30)
    with step_sockets.connect(server.path, 30) as raw:
        raw.recv(1000)
        raw.sendall(struct.pack("<4sH70x", b"SHOL", VERSION + 1).ljust(handshake.HELLO_BYTES, b"\0"))
        assert f"speaks version {VERSION + 1} of steps, this process {VERSION}".encode() in raw.recv(1000)
    server.close()
    with pytest.raises(ChannelClosed):
        accepting.result(30)


def test_an_engine_without_the_token_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        coming = run_in_thread(StepChannelClient, str(tmp_path / "s"), 0, 1, TOKEN)
        raw, _ = listener.accept()
        with raw:
            raw.sendall(handshake.challenge(bytes(NONCE_BYTES)))
            assert TOKEN not in raw.recv(1000)
            raw.sendall(struct.pack("<4sHHI32s", b"SHOL", VERSION, 0, 0, secrets.token_bytes(32)))
            with pytest.raises(ChannelRefused, match="peer that welcomes rank 0 does not hold"):
                coming.result(30)


def test_silent_peers_delay_no_rank(server: StepChannelServer) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(3):
            silent.enter_context(socket.create_connection(server.address))
        coming = run_in_thread(StepChannelClient, server.address, 0, 1, TOKEN)
        server.accept(30)
        coming.result(30).close()


def test_missing_ranks_and_refused_guests_are_named() -> None:
    with contextlib.closing(StepChannelServer(3, TOKEN)) as server:
        accepting = run_in_thread(server.accept, 1.0)
        here = StepChannelClient(server.path, 1, 3, TOKEN)
        with pytest.raises(ChannelRefused):
            StepChannelClient(server.path, 0, 3, b"wrong")
        with pytest.raises(EngineError, match=r"ranks \[0, 2\] of 3 have not connected within 1.0 s; refused: .*token"):
            accepting.result(30)
        here.close()


def test_an_engine_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(EngineError, match=r"rank 0 got no answer from its engine at .*timed out"):
            StepChannelClient(str(tmp_path / "s"), 0, 1, TOKEN, timeout_s=0.05)
    with pytest.raises(EngineError, match="rank 0 cannot reach its engine"):
        StepChannelClient(str(tmp_path / "other"), 0, 1, TOKEN)


@pytest.mark.parametrize(("arguments", "message"), [((2, b"", 0), "token is empty"), ((2, TOKEN, 2), "result_rank 2")])
def test_a_channel_that_cannot_work_is_not_made(arguments: tuple[int, bytes, int], message: str) -> None:
    world_size, token, result_rank = arguments
    with pytest.raises(ValueError, match=message):
        StepChannelServer(world_size, token, result_rank=result_rank)


def test_the_socket_goes_with_the_listener() -> None:
    server = StepChannelServer(1, TOKEN)
    assert server.address is None
    server.close()
    group = Group(1)
    for path in (server.path, group.server.path):  # a channel that is closed, and one that has all its ranks
        with pytest.raises(EngineError, match=f"cannot reach its engine at {path}"):
            StepChannelClient(path, 0, 1, TOKEN)
    group.close()


def test_other_users_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    server = StepChannelServer(1, TOKEN)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    accepting = run_in_thread(server.accept, 30)
    with pytest.raises(EngineError, match="rank 0 got no answer"):
        StepChannelClient(server.path, 0, 1, TOKEN)
    monkeypatch.undo()
    StepChannelClient(server.path, 0, 1, TOKEN).close()
    accepting.result(30)
    server.close()


def test_tcp_sends_at_once_and_notices_dead_hosts() -> None:
    group = Group(2, "127.0.0.1")
    for sock in (group.clients[0]._sock, group.server._ranks[0].sock):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    group.close()


def test_a_listener_that_cannot_be_opened_leaves_nothing_behind() -> None:
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
        step_sockets.Listener("192.0.2.1")
    assert set(Path("/proc/self/fd").iterdir()) == before
