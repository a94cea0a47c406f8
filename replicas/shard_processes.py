"""The ranks of a model copy as processes of this machine: for use without a cluster, and for tests.

They are children of the engine's process, started by its interpreter. None outlives it: each of them watches a socket
that ends with the parent, also when that is killed.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any

from .config import EngineConfig
from .errors import ConfigError, EngineError, ModelError, ServingError, ShardGroupError
from .group_executor import GroupExecutor
from .plan import StepPlan, StepResult
from .step_channel import StepChannelServer

_HOST = "127.0.0.1"
_LEAVE_SECONDS = 5.0  # for ranks to leave by themselves once there are no more plans
_LAST_WORDS_SECONDS = 2.0  # after one rank has failed, for the one that made it fail to be known
# Run by the interpreter with the parent's path, and not as a module: the folder that the process is started in is then
# no place to import from, and the parent's main module is not run again.
_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from {package}.rank_process import main; main(int(sys.argv[1]))"


class RankProcess:
    """A child process that is a rank, and the calls to it: one at a time."""

    def __init__(self, config: EngineConfig, rank: int, local_rank: int) -> None:
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
        self._call: Future[Any] | None = None  # the last one
        self._end: ShardGroupError | None = None  # set once the process has ended
        self._listener = threading.Thread(target=self._listen, name=f"shoal-rank-{rank}", daemon=True)
        self._listener.start()
        self._control.send(("become", (config, rank, local_rank, logging.getLogger().getEffectiveLevel())))

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid})"

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: object) -> Future[Any]:
        """Calls a method of ShardRank. The future fails with what it raises, or with ShardGroupError at its end."""
        call: Future[Any] = Future()
        with self._lock:
            self._call = call
            if self._end is not None:
                call.set_exception(self._end)
                return call
        with contextlib.suppress(OSError):  # whoever listens hears of the end too
            self._control.send((method, arguments))
        return call

    def wait(self, timeout_s: float) -> bool:
        """Whether the process has ended, in that time."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Ends the process, also one that is stopped, and waits for that. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._listener.join()

    def _listen(self) -> None:
        """Passes answers on until the process ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                value, error = self._control.recv()
                call = self._call
                assert call is not None, "nothing was asked"
                call.set_result(value) if error is None else call.set_exception(error)
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"
        with self._lock:
            self._end = ShardGroupError(f"{self} {how}")
            if self._call is not None and not self._call.done():
                self._call.set_exception(self._end)
        self._control.close()


class ShardProcesses:
    """The ranks of one model copy on this machine; implements `Executor`."""

    def __init__(self, executor: GroupExecutor, ranks: Sequence[RankProcess], runs: Sequence[Future[Any]]) -> None:
        self.num_blocks = executor.num_blocks
        self.ranks = tuple(ranks)
        self._executor = executor
        self._runs = tuple(runs)  # each done when its rank runs no plans any more
        self._patience_s = _LEAVE_SECONDS

    def submit(self, plan: StepPlan) -> None:
        """Send a plan to every rank; returns at once. Raises EngineError when one is gone."""
        try:
            self._executor.submit(plan)
        except EngineError as error:
            raise self._explained(error) from error

    def result(self) -> StepResult:
        """The result of the oldest plan not yet answered. Raises EngineError if the step fails or a rank is gone."""
        try:
            return self._executor.result()
        except EngineError as error:
            raise self._explained(error) from error

    def shutdown(self) -> None:
        """Tells the ranks that no more plans come, and ends those that do not leave by themselves. Idempotent."""
        self._executor.shutdown()
        _end_all(self.ranks, self._patience_s)

    def _explained(self, error: EngineError) -> EngineError:
        """The error, and which process has ended: the ranks that are left know no more than that a peer is gone."""
        self._patience_s = 0.0  # those that are left may wait for one that is gone
        wait(self._runs, _LAST_WORDS_SECONDS, return_when=FIRST_COMPLETED)
        ends = [str(run.exception()) for run in self._runs if run.done() and run.exception()]
        return type(error)(f"{error.message}; {'; '.join(ends)}") if ends else error


def start_shard_processes(config: EngineConfig, *, timeout_s: float = 1800.0) -> ShardProcesses:
    """Starts as many processes as the configuration has ranks, and loads the model in them.

    config: resolved. timeout_s: for all of it. Raises what a rank says of the configuration or the model (ConfigError,
    ModelError), else ShardGroupError. No process is left then.
    """
    builder = _Builder(config, time.monotonic() + timeout_s)
    try:
        return builder.build()
    except BaseException:
        builder.undo()
        raise


class _Builder:
    """A group that is half made."""

    def __init__(self, config: EngineConfig, deadline: float) -> None:
        self._config, self._deadline = config, deadline
        self._ranks: list[RankProcess] = []
        self._server: StepChannelServer | None = None

    def build(self) -> ShardProcesses:
        parallel = self._config.parallel
        for rank in range(parallel.world_size):
            self._ranks.append(RankProcess(self._config, rank, local_rank=rank))
        store = self._all("open the store", self._ranks[:1], "open_store", _HOST)[0]
        self._all("meet", self._ranks, "join", store, self._left())
        num_blocks = min(self._all("load the model", self._ranks, "load"))
        token = secrets.token_bytes(32)
        last_stage = (parallel.pipeline_parallel_size - 1) * parallel.tensor_parallel_size
        self._server = StepChannelServer(parallel.world_size, token, result_rank=last_stage)
        runs = [rank.call("serve", self._server.path, token) for rank in self._ranks]
        with ThreadPoolExecutor(1) as pool:
            accepting = pool.submit(self._server.accept, self._left())
            wait([accepting, *runs], return_when=FIRST_COMPLETED)
            if any(run.done() for run in runs):  # nobody need wait for the others
                self._server.close()
                raise _failure("connect", self._ranks, runs)
            accepting.result()
        return ShardProcesses(GroupExecutor(self._server, num_blocks), self._ranks, runs)

    def undo(self) -> None:
        if self._server is not None:
            self._server.close()
        _end_all(self._ranks, 0.0)

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())

    def _all(self, what: str, ranks: Sequence[RankProcess], method: str, *arguments: object) -> list[Any]:
        """The answers of all ranks to a call."""
        calls = [rank.call(method, *arguments) for rank in ranks]
        _, unanswered = wait(calls, self._left(), return_when=FIRST_EXCEPTION)
        if any(call.done() and call.exception() for call in calls):
            wait(calls, _LAST_WORDS_SECONDS)  # one rank's end makes others fail, and may be known later than theirs
            raise _failure(what, ranks, calls)
        if unanswered:
            silent = ", ".join(str(rank) for rank, call in zip(ranks, calls, strict=True) if not call.done())
            raise ShardGroupError(f"the ranks could not {what} in time: no answer from {silent}; look at its output")
        return [call.result() for call in calls]


def _end_all(ranks: Sequence[RankProcess], patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    for rank in ranks:
        rank.wait(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.kill()


def _failure(what: str, ranks: Sequence[RankProcess], calls: Sequence[Future[Any]]) -> ServingError:
    """The error of calls of which some failed; what a rank says of configuration or model stands for all."""
    failed = [
        (rank, error) for rank, call in zip(ranks, calls, strict=True) if call.done() and (error := call.exception())
    ]
    for _, error in failed:
        if isinstance(error, ConfigError | ModelError):
            return error
    said = "; ".join(f"{rank}: {error}" for rank, error in failed)
    return ShardGroupError(f"the ranks could not {what}: {said}")
