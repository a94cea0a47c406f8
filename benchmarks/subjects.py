"""Subjects of a comparison: engines in worker processes, and servers; start, wait and stop."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from shoal.deploy.bench import serving
from shoal.deploy.bench.http_client import Target
from shoal.deploy.bench.limits import Rates
from shoal.deploy.bench.workload import Workload
from shoal.deploy.resources import visible_gpus
from shoal.replicas.errors import ServingError

Subject = TypeVar("Subject")
Said = TypeVar("Said")

WORKER = Path(__file__).resolve().parent / "worker.py"
START_TIMEOUT_S = 240.0
RUN_TIMEOUT_S = 240.0
_STOP_TIMEOUT_S = 20.0
VLLM_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # built at run time, and sampling is not compared
}


def lacking_gpus(model: str, needed: int) -> str | None:
    """What this machine lacks for a benchmark of `model`; None if it can run. Only tiny runs on
    a CPU.

    Several copies of an 8B model would fill a CPU's memory before one were ready.
    """
    found = visible_gpus()
    if model == "tiny" or found >= needed:
        return None
    return f"{model} needs {needed} GPU{'s' * (needed > 1)}, and there are {found}; tiny is a trial run on a CPU"


def unwind_when_terminated() -> None:
    """Make SIGTERM unwind like Ctrl-C, so that started engines and servers are stopped."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


class Worker:
    """An engine behind a pipe (worker.py). The constructor starts to load; `wait` returns when it is loaded."""

    def __init__(self, process: subprocess.Popen[str], settings: dict[str, Any]) -> None:
        self._process = process
        self._lines: queue.Queue[tuple[float, str | None]] = (
            queue.Queue()
        )  # arrival time, and None at the end of output
        self._begin = time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()
        self._send(settings)

    def wait(self) -> dict[str, Any]:
        """The engine's description, and seconds from process start until it was ready."""
        came, ready = self._answer(START_TIMEOUT_S)
        return ready | {"ready_s": came - self._begin}

    def run(self, workload: Workload) -> float:
        """Seconds of the workload. Raises RuntimeError with the worker's traceback."""
        self._send(
            {
                "prompts": workload.prompts,
                "num_new_tokens": workload.num_new_tokens,
                "temperature": workload.temperature,
            }
        )
        return self._answer(RUN_TIMEOUT_S)[1]["seconds"]

    def rates(self, dtype: str) -> Rates:
        """Peak rates of the device; only Shoal's worker answers."""
        self._send({"rates": dtype})
        return Rates(**self._answer(RUN_TIMEOUT_S)[1])

    def _read(self) -> None:
        with _pipe(self._process.stdout) as lines:
            for line in lines:
                self._lines.put((time.monotonic(), line))
        self._lines.put((time.monotonic(), None))

    def _send(self, order: dict[str, Any]) -> None:
        pipe = _pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it has ended; its last output is still to be read
            pipe.write(json.dumps(order) + "\n")
            pipe.flush()

    def _answer(self, timeout: float) -> tuple[float, dict[str, Any]]:
        try:
            came, line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise RuntimeError(f"the worker gave no answer within {timeout:.0f} s") from None
        if line is None:
            self._lines.put((came, None))
            raise RuntimeError(f"the worker ended with status {self._process.wait(_STOP_TIMEOUT_S)}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return came, answer


@dataclass(frozen=True, slots=True)
class Python:
    """An interpreter, its package path (None: this process's), and additional environment variables."""

    executable: str = sys.executable
    path: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        path = {} if self.path is None else {"PYTHONPATH": self.path}
        return {**os.environ, **path, **self.variables}


@contextmanager
def started_worker(
    engine: str, settings: dict[str, Any], log: Path, python: Python, worker: Path = WORKER
) -> Iterator[Worker]:
    """A worker that loads; stopped by closing its input, then by force."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [python.executable, "-P", str(worker), engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd="/tmp",
            env=python.environment,
            start_new_session=True,
        )
        try:
            yield Worker(process, settings)
        finally:
            with contextlib.suppress(BrokenPipeError):
                _pipe(process.stdin).close()
            _end(process)


class Server:
    """An OpenAI API server in a process. `wait` returns when it answers."""

    def __init__(self, process: subprocess.Popen[bytes], target: Target) -> None:
        self._process = process
        self._begin = time.monotonic()
        self.target = target

    def wait(self, shape: serving.Shape) -> float:
        """Seconds from process start until it answered some requests. Raises its last answer."""
        while True:
            try:
                serving.first_model(f"http://{self.target.host}:{self.target.port}")
                ready_s = time.monotonic() - self._begin
                serving.warm_up(self.target, shape)
            except ServingError:
                if self._process.poll() is not None or time.monotonic() - self._begin > START_TIMEOUT_S:
                    raise
                time.sleep(0.5)
            else:
                return ready_s


@contextmanager
def started_server(python: Python, arguments: list[str], target: Target, log: Path) -> Iterator[Server]:
    """A starting server; stopped as by Ctrl-C, then by force."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [python.executable, "-P", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd="/tmp",
            env=python.environment,
            start_new_session=True,
        )
        try:
            yield Server(process, target)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            _end(process)


def shoal_arguments(folder: Path, target: Target, settings: dict[str, Any], more: list[str], host: str) -> list[str]:
    """`shoal serve`; with host 0.0.0.0 it uses HAProxy instead of the loopback proxy."""
    command = ["-m", "shoal.deploy.cli", "serve", str(folder), "--host", host]
    return [*command, *_flags(target, settings), *more]


def vllm_arguments(folder: Path, target: Target, settings: dict[str, Any]) -> list[str]:
    """`vllm serve`, which also listens on every interface."""
    command = ["-m", "vllm.entrypoints.cli.main", "serve", str(folder), "--dtype", "bfloat16"]
    return [*command, *_flags(target, settings), "--gpu-memory-utilization", "0.45"]


def _flags(target: Target, settings: dict[str, Any]) -> list[str]:
    flags = ["--served-model-name", target.model, "--port", str(target.port), "--no-enable-prefix-caching"]
    return flags + [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def wait_for_all(
    subjects: Mapping[str, Subject], wait: Callable[[Subject], Said], log: Callable[[str], Path]
) -> dict[str, Said]:
    """Each subject's answer when ready. Leaves out those that fail, and prints their log's path."""
    ready, begin = {}, time.monotonic()
    with ThreadPoolExecutor() as pool:  # concurrently, so that each time is its own
        waiting = {name: pool.submit(wait, subject) for name, subject in subjects.items()}
        for name, future in waiting.items():
            try:
                ready[name] = future.result()
            except Exception as error:  # the other subject's figures are still useful
                say(f"{name} did not come up ({log(name)}): {error}")
    say(f"ready after {time.monotonic() - begin:.0f} s: {', '.join(ready)}")
    return ready


def _end(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "the process was started with pipes"
    return stream
