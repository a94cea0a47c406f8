"""Plans and results between an engine and its ranks: threads where both ends live, processes where one dies."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.replicas import step_handshake as handshake
from shoal.replicas import step_sockets
from shoal.replicas.engine import Engine
from shoal.replicas.errors import EngineError
from shoal.replicas.plan import LogprobArrays, RowStart, StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams
from shoal.replicas.step_channel import ChannelClosed, PeerLost, StepChannelClient, StepChannelServer
from shoal.replicas.step_frames import VERSION, EndOfSteps, FrameEncoder, FrameError
from shoal.replicas.step_handshake import ChannelRefused
from tests.support.engines import EOS, VOCAB_SIZE, Transcript, make_engine, naive
from tests.support.fake_executor import FakeExecutor
from tests.support.steps import decode_plan, same

TOKEN = secrets.token_bytes(32)
ROOT = Path(__file__).parents[2]
HOSTS = pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["unix", "tcp"])


def run_in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *args)
    pool.shutdown(wait=False)
    return future


class Group:
    """A server and its ranks, in one process."""

    def __init__(self, world_size: int = 2, host: str | None = None, result_rank: int = 0) -> None:
        self.server = StepChannelServer(world_size, TOKEN, result_rank=result_rank, host=host)
        address = self.server.address or self.server.path
        coming = [run_in_thread(StepChannelClient, address, rank, world_size, TOKEN) for rank in range(world_size)]
        self.server.accept(30)
        self.clients: list[StepChannelClient] = [future.result(30) for future in coming]

    def close(self) -> None:
        self.server.close()
        for client in self.clients:
            client.close()


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[Group]:
    made = Group(**getattr(request, "param", {}))
    yield made
    made.close()


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, plan.sample_rows + plan.step)


def large_plan(step: int, num_ints: int) -> StepPlan:
    start = RowStart(0, 1, num_ints, SamplingParams(frequency_penalty=1.0), tuple(range(num_ints)))
    return replace(decode_plan(step), row_starts=(start,))


def large_result(step: int, num_tokens: int) -> StepResult:
    ints, floats = np.arange(num_tokens, dtype=np.int32), np.arange(num_tokens, dtype=np.float32)
    tops = LogprobArrays(ints, floats, ints, np.stack([ints] * 20, 1), np.stack([floats] * 20, 1))
    return StepResult(step, np.ones(1, np.int32), prompt_logprobs=(tops,))


@HOSTS
def test_every_rank_gets_every_plan_and_one_answers(host: str | None) -> None:
    group = Group(3, host, result_rank=2)
    plans = [decode_plan(step, 32) for step in range(10, 14)]
    for plan in plans:
        group.server.submit(plan)
    for client in group.clients:
        received = [client.receive() for _ in plans]
        assert same(tuple(received), tuple(plans))
    for plan in plans:
        group.clients[2].send_result(answer(plan))
    assert same(tuple(group.server.result() for _ in plans), tuple(map(answer, plans)))
    group.server.close()
    for client in group.clients:
        assert client.receive() is None
        assert client.receive() is None
        client.close()


def test_ranks_of_one_group_may_come_by_unix_socket_and_by_tcp() -> None:
    server = StepChannelServer(2, TOKEN, host="127.0.0.1")
    addresses = (server.path, server.address)
    coming = [run_in_thread(StepChannelClient, address, rank, 2, TOKEN) for rank, address in enumerate(addresses)]
    server.accept(30)
    server.submit(decode_plan(0))
    for future in coming:
        assert same(future.result(30).receive(), decode_plan(0))
        future.result().close()
    server.close()


class ChannelExecutor:
    """Plans go through a channel to two ranks, each with a fake model; implements `Executor`."""

    def __init__(self, num_blocks: int, block_size: int, max_rows: int) -> None:
        self.num_blocks = num_blocks
        self.group = Group(2)
        models = [FakeExecutor(num_blocks, block_size, max_rows, 64, VOCAB_SIZE, (EOS,)) for _ in self.group.clients]
        self.ranks = [run_in_thread(self.serve, *pair) for pair in zip(self.group.clients, models, strict=True)]
        self.submit, self.result = self.group.server.submit, self.group.server.result

    def serve(self, client: StepChannelClient, model: FakeExecutor) -> int:
        num_steps = 0
        while (plan := client.receive()) is not None:
            model.submit(plan)
            result = model.result()
            if client is self.group.clients[0]:
                client.send_result(result)
            num_steps += 1
        return num_steps

    def shutdown(self) -> None:
        self.group.server.close()


def test_an_engine_that_works_through_a_channel_gives_the_tokens_of_the_naive_loop() -> None:
    """Chunks, preemption, forks, scored prompts: everything that a plan can hold crosses the channel."""
    local, _ = make_engine(num_blocks=20, max_num_seqs=4, max_model_len=64)
    executor = ChannelExecutor(20, 4, 4)
    engine = Engine(local.config, local.facts, executor)
    requests = [
        Request("fork", tuple(range(5, 25)), SamplingParams(max_tokens=12, logprobs=2, prompt_logprobs=2), 3),
        Request("emitted", (5, 6, 7), SamplingParams(max_tokens=20, bad_words=((1, 2),), logit_bias=((3, -1.0),))),
        Request("long", tuple(range(5, 35)), SamplingParams(max_tokens=20, stop_token_ids=(4,), seed=2**64 - 1)),
    ]
    for request in requests:
        engine.add_request(request)
    transcript = Transcript().run(engine)
    for request in requests:
        assert transcript.outcome(request) == naive(request)
    engine.shutdown()
    num_steps = {rank.result(30) for rank in executor.ranks}
    assert len(num_steps) == 1
    executor.group.close()


@HOSTS
def test_frames_larger_than_the_buffers_pass_in_both_directions_at_once(host: str | None) -> None:
    """A rank that sends a large result before it takes the next plan must not block an engine that is sending it."""
    group = Group(2, host)

    def work(client: StepChannelClient, answers: bool) -> list[int]:
        sizes = []
        while (plan := client.receive()) is not None:
            sizes.append(len(plan.row_starts[0].prompt_token_ids))
            if answers:
                client.send_result(large_result(plan.step, 100_000))
        return sizes

    ranks = [run_in_thread(work, client, client is group.clients[0]) for client in group.clients]
    for step in range(4):
        group.server.submit(large_plan(step, 400_000))
    for step in range(4):
        assert same(group.server.result(), large_result(step, 100_000))
    group.server.close()
    assert [rank.result(30) for rank in ranks] == [[400_000] * 4] * 2
    group.close()


@pytest.mark.parametrize("sizes", [[2700, 1, 2600, 4, 4], [1], [2728] * 3, [10_000, 3, 10_000]], ids=str)
def test_frames_of_all_sizes_follow_one_another(group: Group, sizes: list[int]) -> None:
    """As many as the staging buffer holds, and some that it does not."""
    plans = [decode_plan(step, size) for step, size in enumerate(sizes)]
    sending = run_in_thread(lambda: [group.server.submit(plan) for plan in plans])
    other = run_in_thread(lambda: [group.clients[1].receive() for _ in plans])
    assert same(tuple(group.clients[0].receive() for _ in plans), tuple(plans))
    sending.result(30)
    other.result(30)


def test_received_plans_keep_their_values(group: Group) -> None:
    plans = [decode_plan(step, 8 + step) for step in range(50)]
    for plan in plans:
        group.server.submit(plan)
    received = [group.clients[0].receive() for _ in plans]
    assert same(tuple(received), tuple(plans))


def test_steps_must_follow_one_another(group: Group) -> None:
    group.server.submit(decode_plan(7))
    group.server.submit(decode_plan(9))
    assert group.clients[1].receive() is not None
    with pytest.raises(FrameError, match="rank 1 was sent step 9 after step 7"):
        group.clients[1].receive()


def test_results_must_follow_one_another(group: Group) -> None:
    for step in (3, 4):
        group.server.submit(decode_plan(step))
    group.clients[0].send_result(answer(decode_plan(4)))
    with pytest.raises(FrameError, match=r"of step 4; steps in flight: \[3, 4\]"):
        group.server.result()
    with pytest.raises(FrameError, match="of step 4"):  # it stays so
        group.server.submit(decode_plan(5))


def test_only_the_rank_that_samples_answers(group: Group) -> None:
    group.server.submit(decode_plan(3))
    group.clients[1].send_result(answer(decode_plan(3)))
    with pytest.raises(FrameError, match="rank 1 sent a StepResult; only rank 0 answers"):
        group.server.result()


def test_any_rank_can_say_that_a_step_failed(group: Group) -> None:
    group.server.submit(decode_plan(3))
    group.clients[1].send_failure(3, "out of memory: 12 MiB")
    with pytest.raises(EngineError, match="step 3 failed on rank 1: out of memory: 12 MiB"):
        group.server.result()


def test_a_plan_that_does_not_fit_leaves_the_channel_as_it_was(group: Group) -> None:
    with pytest.raises(FrameError, match="step 3 does not fit"):
        group.server.submit(replace(decode_plan(3), rows=np.zeros(4, np.int64)))
    group.server.submit(decode_plan(3))
    assert same(group.clients[0].receive(), decode_plan(3))


def test_a_result_is_asked_for_only_where_one_is_due(group: Group) -> None:
    with pytest.raises(EngineError, match="no plan is in flight"):
        group.server.result()
    with pytest.raises(EngineError, match="all 2 ranks have been accepted already"):
        group.server.accept(1)


def test_nothing_is_sent_before_the_ranks_are_there() -> None:
    with contextlib.closing(StepChannelServer(2, TOKEN)) as server, pytest.raises(EngineError, match="no rank of 2"):
        server.submit(decode_plan(0))


# --- who is let in


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
def test_who_does_not_belong_is_told_why(
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
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(server.path)
        raw.recv(1000)
        raw.sendall(struct.pack("<4sH70x", b"SHOL", VERSION + 1).ljust(handshake.HELLO_BYTES, b"\0"))
        assert f"speaks version {VERSION + 1} of steps, this process {VERSION}".encode() in raw.recv(1000)
    server.close()
    with pytest.raises(ChannelClosed):
        accepting.result(30)


def test_an_impostor_engine_is_not_believed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        coming = run_in_thread(StepChannelClient, str(tmp_path / "s"), 0, 1, TOKEN)
        raw, _ = listener.accept()
        with raw:
            raw.sendall(handshake.challenge(handshake.new_nonce()))
            assert TOKEN not in raw.recv(1000)
            raw.sendall(struct.pack("<4sHHI32s", b"SHOL", VERSION, 0, 0, secrets.token_bytes(32)))
            with pytest.raises(ChannelRefused, match="peer that welcomes rank 0 does not hold"):
                coming.result(30)


def test_who_says_nothing_keeps_nobody_waiting(server: StepChannelServer) -> None:
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


# --- sockets


def test_the_socket_is_private_and_goes_with_the_door() -> None:
    server = StepChannelServer(1, TOKEN)
    folder = Path(server.path).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert server.address is None
    server.close()
    assert not folder.exists()
    group = Group(1)
    assert not Path(group.server.path).parent.exists()  # nobody else may come
    group.close()


def test_a_deep_folder_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    group = Group(1)
    assert group.server.path.startswith(str(deep))
    group.server.submit(decode_plan(0))
    assert same(group.clients[0].receive(), decode_plan(0))
    group.close()
    assert not list(deep.iterdir())


@pytest.mark.parametrize("group", [{"host": "127.0.0.1"}], indirect=True)
def test_tcp_sends_at_once_and_notices_dead_hosts(group: Group) -> None:
    for sock in (group.clients[0]._sock, group.server._ranks[0].sock):
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_a_door_that_cannot_open_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
        step_sockets.Door("192.0.2.1")
    assert not list(tmp_path.iterdir())


# --- raw bytes after a proper handshake


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
        (bytes(FrameEncoder().encode(EndOfSteps())), "rank 0 sent a EndOfSteps"),
        (bytes(FrameEncoder().encode(decode_plan(0))), "rank 0 sent a StepPlan"),
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
    sock.sendall(FrameEncoder().encode(answer(decode_plan(0)))[:cut])
    sock.close()
    with pytest.raises(PeerLost, match=r"rank 0 of 1 is gone \(.+\); steps in flight: \[0\]"):
        server.result()


def test_a_frame_may_come_byte_by_byte(raw_rank: tuple[StepChannelServer, socket.socket]) -> None:
    server, sock = raw_rank
    waiting = run_in_thread(server.result)
    for byte in bytes(FrameEncoder().encode(answer(decode_plan(0)))):
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


# --- closing


def wait_until_asleep(thread_id: int) -> None:
    """Until the thread waits in the kernel."""
    stat = Path(f"/proc/self/task/{thread_id}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)


def blocked(function: Callable[[], Any]) -> Future[Any]:
    """The call in a thread of its own, once it waits."""
    ids: Future[int] = Future()

    def call() -> Any:
        ids.set_result(threading.get_native_id())
        return function()

    future = run_in_thread(call)
    wait_until_asleep(ids.result(30))
    return future


def test_close_wakes_an_engine_that_waits(group: Group) -> None:
    group.server.submit(decode_plan(0))
    waiting = blocked(group.server.result)
    group.server.close()
    group.server.close()
    with pytest.raises(ChannelClosed):
        waiting.result(30)
    with pytest.raises(ChannelClosed):
        group.server.submit(decode_plan(1))
    assert group.clients[0].receive() is not None  # what was sent before is not lost
    assert group.clients[0].receive() is None


def test_close_wakes_an_engine_that_sends_to_ranks_that_do_not_listen(group: Group) -> None:
    sending = run_in_thread(group.server.submit, large_plan(0, 2_000_000))
    assert select.select([group.clients[0]._sock], [], [], 30)[0]
    group.server.close()
    with pytest.raises(ChannelClosed):
        sending.result(30)
    with pytest.raises(PeerLost, match="engine of rank 0 is gone"):  # not an orderly end: half a plan came
        group.clients[0].receive()


def test_close_wakes_an_engine_that_waits_for_its_ranks(server: StepChannelServer) -> None:
    waiting = blocked(lambda: server.accept(60))
    server.close()
    with pytest.raises(ChannelClosed):
        waiting.result(30)


@HOSTS
def test_close_wakes_a_rank_that_waits(host: str | None) -> None:
    group = Group(2, host)
    waiting = blocked(group.clients[1].receive)
    group.clients[1].close()
    group.clients[1].close()
    with pytest.raises(ChannelClosed, match="rank 1 is closed"):
        waiting.result(30)
    with pytest.raises(ChannelClosed):
        group.clients[1].send_failure(0, "too late")
    with pytest.raises(ChannelClosed):
        group.clients[1].receive()
    group.close()


# --- processes


class Processes:
    """Processes of `tests.support.step_rank`, ended with the test."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[str]] = []

    def start(self, *arguments: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.step_rank", *map(str, arguments)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.all.append(process)
        assert process.stdin is not None
        process.stdin.write(TOKEN.hex() + "\n")
        process.stdin.flush()
        return process

    def ranks(self, server: StepChannelServer, world_size: int) -> list[subprocess.Popen[str]]:
        address = server.path if server.address is None else "{}:{}".format(*server.address)
        started = [self.start("rank", address, rank, world_size) for rank in range(world_size)]
        server.accept(60)
        return started


@pytest.fixture
def processes() -> Iterator[Processes]:
    made = Processes()
    yield made
    for process in made.all:
        process.kill()
        process.communicate()


@HOSTS
def test_a_killed_rank_is_named_at_once_and_the_others_are_told(processes: Processes, host: str | None) -> None:
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


def test_a_killed_rank_is_noticed_by_an_engine_that_only_sends(processes: Processes) -> None:
    server = StepChannelServer(1, TOKEN)
    (rank,) = processes.ranks(server, 1)
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait(30)
    with pytest.raises(PeerLost, match="rank 0 of 1 is gone"):
        server.submit(decode_plan(0))
    server.close()


def test_a_killed_engine_is_noticed_by_a_rank_that_waits(processes: Processes) -> None:
    engine = processes.start("engine")
    assert engine.stdout is not None
    client = StepChannelClient(engine.stdout.readline().strip(), 0, 1, TOKEN)
    assert same(client.receive(), decode_plan(41))
    waiting = blocked(client.receive)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(PeerLost, match=r"the engine of rank 0 is gone \(it hung up\); last step received: 41"):
        waiting.result(30)
    engine.wait(30)
    with pytest.raises(PeerLost):
        client.send_result(answer(decode_plan(41)))
    client.close()


def test_ranks_in_processes_end_with_the_engine(processes: Processes) -> None:
    server = StepChannelServer(2, TOKEN, host="127.0.0.1")
    ranks = processes.ranks(server, 2)
    server.close()
    assert [rank.communicate(timeout=30)[0].strip() for rank in ranks] == ["no more plans"] * 2


def test_waiting_costs_no_cpu(processes: Processes) -> None:
    server = StepChannelServer(1, TOKEN)
    processes.ranks(server, 1)
    server.submit(decode_plan(0))
    server.result()
    time.sleep(0.5)  # what is measured
    server.submit(decode_plan(1))
    assert server.result().token_ids[0] < 20  # ms
    server.close()
