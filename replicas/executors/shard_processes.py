"""Ranks as child processes on this machine, for use without a cluster and for tests.

Each watches a socket that closes with the parent, so none outlives a killed engine.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from ..channel.step_channel import StepChannelServer
from ..config import GROUP_START_TIMEOUT_S, ResolvedConfig
from ..errors import ConfigError, ShardGroupError
from .group_executor import GroupExecutor
from .group_start import GroupStart, Loaded
from .step_watchdog import StepWatchdog, is_stopped

_HOST = "127.0.0.1"
_LEAVE_SECONDS = 5.0  # for ranks to exit after the last plan
# Not `python -m`, which would import from the working directory and rerun the parent's main.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from {package}.rank_process import main; main(int(sys.argv[1]))"


class RankProcess:
    """A rank's child process; calls run one at a time."""

    def __init__(self, config: ResolvedConfig, rank: int, local_rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            program = _PROGRAM.format(package=__package__)
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._control = Connection(ours.detach())
        self._lock = threading.Lock()
        self._call: Future[Any] | None = None
        self._end: ShardGroupError | None = None  # set once the process has ended
        self._listener = threading.Thread(target=self._listen, name=f"shoal-rank-{rank}", daemon=True)
        self._listener.start()
        with contextlib.suppress(OSError):  # the first call reports its end
            level = logging.getLogger("shoal").getEffectiveLevel()
            self._control.send(("become", (config, rank, local_rank, level)))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: object) -> Future[Any]:
        """Call a method of ShardRank. The future fails with its error, or ShardGroupError if the process ends."""
        call: Future[Any] = Future()
        with self._lock:
            self._call = call
            if self._end is not None:
                call.set_exception(self._end)
                return call
        with contextlib.suppress(OSError):  # the listener reports the end
            self._control.send((method, arguments))
        return call

    def is_stopped(self) -> bool:
        return is_stopped(self.pid)

    def wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Kill the process, even if stopped, and wait for it. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._listener.join()

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                value, error = self._control.recv()
                call = self._call
                assert call is not None, "an answer without a call"
                call.set_result(value) if error is None else call.set_exception(error)
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"
        with self._lock:
            self._end = ShardGroupError(f"it {how}")
            if self._call is not None and not self._call.done():
                self._call.set_exception(self._end)
        self._control.close()


class ShardProcesses(GroupExecutor):
    """Ranks of one model copy on this machine; implements `Executor`."""

    def __init__(
        self,
        loaded: Loaded,
        server: StepChannelServer,
        ranks: Sequence[RankProcess],
        runs: Sequence[Future[Any]],
        watchdog: StepWatchdog,
    ) -> None:
        super().__init__(loaded, server, ranks, runs, watchdog)
        self.ranks = tuple(ranks)

    def shutdown(self) -> None:
        super().shutdown()
        _end_all(self.ranks, 0.0 if self.failed else _LEAVE_SECONDS)


def start_shard_processes(config: ResolvedConfig, *, timeout_s: float = GROUP_START_TIMEOUT_S) -> ShardProcesses:
    """Start a process per rank and load the model.

    config: resolved. timeout_s: total. Raises a rank's ConfigError or ModelError, else
    ShardGroupError; no process is left then.
    """
    _check_gpus(config)
    start = GroupStart(config, timeout_s)
    ranks: list[RankProcess] = []
    try:
        for rank in range(config.parallel.world_size):
            ranks.append(RankProcess(config, rank, local_rank=rank))
        loaded = start.load(ranks, _HOST)
        server, runs = start.connect(ranks, [False] * len(ranks), _HOST)
    except BaseException:
        _end_all(ranks, 0.0)
        raise
    return ShardProcesses(loaded, server, ranks, runs, StepWatchdog.of(config))


def _check_gpus(config: ResolvedConfig) -> None:
    if config.device != "cuda":
        return
    from torch.cuda import device_count

    parallel, found = config.parallel, device_count()
    if parallel.world_size > found:
        raise ConfigError(
            f"tensor_parallel_size {parallel.tensor_parallel_size} x pipeline_parallel_size "
            f"{parallel.pipeline_parallel_size} needs {parallel.world_size} GPUs, and this process sees {found}; lower "
            "them, or look at CUDA_VISIBLE_DEVICES"
        )


def _end_all(ranks: Sequence[RankProcess], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    for rank in ranks:
        rank.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()
