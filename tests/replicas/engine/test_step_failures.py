"""Ranks that break the protocol, and processes that are killed."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.replicas.channel import step_handshake as handshake
from shoal.replicas.channel import step_sockets
from shoal.replicas.channel.step_channel import PeerLost, StepChannelClient, StepChannelServer
from shoal.replicas.channel.step_frames import VERSION, EndOfSteps, FrameError, encode
from tests.support.step_group import HOSTS, TOKEN, answer, blocked, run_in_thread
from tests.support.step_processes import StepProcesses, said, step_processes
from tests.support.steps import decode_plan, same


@pytest.fixture
def raw_rank() -> Iterator[tuple[StepChannelServer, socket.socket]]:
    """A server whose one rank is a socket of ours, with a step in flight."""
    server = StepChannelServer(1, TOKEN)
    accepting = run_in_thread(server.accept, 30)
    sock = step_sockets.connect(server.path, 30)
    handshake.introduce(sock, 0, 1, TOKEN)
    accepting.result(30)
    server.submit(decode_plan(0))
    yield server, sock
    server.close()
    sock.close()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GET / HTTP/1.1\r\n".ljust(100), "begins with b'GET '"),
        (struct.pack("<4sHHI", b"SHOL", VERSION, 2, 2**32 - 8).ljust(64, b"\0"), "claims 4294967288 bytes"),
        (struct.pack("<4sHHI", b"SHOL", VERSION + 1, 2, 64).ljust(64, b"\0"), f"version {VERSION + 1}"),
        (encode(EndOfSteps()), "rank 0 sent a EndOfSteps"),
        (encode(decode_plan(0)), "rank 0 sent a StepPlan"),
    ],
)
def test_what_is_no_result_is_refused(
    raw_rank: tuple[StepChannelServer, socket.socket], data: bytes, message: str
) -> None:
    server, sock = raw_rank
    sock.sendall(data)
    with pytest.raises(FrameError, match=message):
        server.result()


@pytest.mark.parametrize("cut", [1, 63, 64, 71])
def test_a_frame_that_ends_too_early_is_a_lost_rank(
    raw_rank: tuple[StepChannelServer, socket.socket], cut: int
) -> None:
    server, sock = raw_rank
    sock.sendall(encode(answer(decode_plan(0)))[:cut])
    sock.close()
    with pytest.raises(PeerLost, match=r"rank 0 of 1 is gone \(.+\); steps in flight: \[0\]"):
        server.result()


def test_a_frame_may_come_byte_by_byte(raw_rank: tuple[StepChannelServer, socket.socket]) -> None:
    server, sock = raw_rank
    waiting = run_in_thread(server.result)
    for byte in encode(answer(decode_plan(0))):
        sock.sendall(bytes([byte]))
    assert same(waiting.result(30), answer(decode_plan(0)))


def test_a_large_claim_takes_no_memory_until_it_comes_true(raw_rank: tuple[StepChannelServer, socket.socket]) -> None:
    server, sock = raw_rank

    def resident_kib() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    before = resident_kib()
    sock.sendall(struct.pack("<4sHHI", b"SHOL", VERSION, 2, 1 << 30).ljust(64, b"\0"))
    sock.shutdown(socket.SHUT_WR)
    with pytest.raises(PeerLost):
        server.result()
    assert resident_kib() - before < 64 << 10


@pytest.fixture
def processes() -> Iterator[StepProcesses]:
    with step_processes() as made:
        yield made


@HOSTS
def test_a_killed_rank_is_named_at_once_and_the_others_are_told(processes: StepProcesses, host: str | None) -> None:
    server = StepChannelServer(2, TOKEN, host=host)
    ranks = processes.ranks(server, 2)
    server.submit(decode_plan(0))
    server.result()
    os.kill(ranks[0].pid, signal.SIGSTOP)  # so that no result comes
    server.submit(decode_plan(1))
    waiting = blocked(server.result)
    os.kill(ranks[1].pid, signal.SIGKILL)
    with pytest.raises(PeerLost, match=r"rank 1 of 2 is gone \(.*\); steps in flight: \[1\]"):
        waiting.result(30)
    with pytest.raises(PeerLost, match="rank 1 of 2"):
        server.submit(decode_plan(2))
    os.kill(ranks[0].pid, signal.SIGCONT)
    server.close()
    output, _ = ranks[0].communicate(timeout=30)
    assert output.strip() == "no more plans" or "PeerLost: the engine of rank 0 is gone" in output


def test_a_killed_rank_is_noticed_by_an_engine_that_only_sends(processes: StepProcesses) -> None:
    server = StepChannelServer(1, TOKEN)
    (rank,) = processes.ranks(server, 1)
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait(30)
    with pytest.raises(PeerLost, match="rank 0 of 1 is gone"):
        server.submit(decode_plan(0))
    server.close()


def test_a_killed_engine_is_noticed_by_a_rank_that_waits(processes: StepProcesses) -> None:
    engine = processes.start("engine")
    client = StepChannelClient(said(engine), 0, 1, TOKEN)
    assert same(client.receive(), decode_plan(41))
    waiting = blocked(client.receive)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(PeerLost, match=r"the engine of rank 0 is gone \(it hung up\); last step received: 41"):
        waiting.result(30)
    engine.wait(30)
    with pytest.raises(PeerLost):
        client.send_result(answer(decode_plan(41)))
    client.close()


def test_ranks_in_processes_end_with_the_engine(processes: StepProcesses) -> None:
    server = StepChannelServer(2, TOKEN, host="127.0.0.1")
    ranks = processes.ranks(server, 2)
    server.close()
    assert [rank.communicate(timeout=30)[0].strip() for rank in ranks] == ["no more plans"] * 2


def test_waiting_costs_no_cpu(processes: StepProcesses) -> None:
    server = StepChannelServer(1, TOKEN)
    processes.ranks(server, 1)
    server.submit(decode_plan(0))
    server.result()
    time.sleep(0.5)  # what is measured
    server.submit(decode_plan(1))
    assert server.result().token_ids[0] < 20  # ms
    server.close()
