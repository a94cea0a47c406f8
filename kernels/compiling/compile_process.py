"""Owner's handle on a process that compiles kernels (compile_worker_triton.py).

Start it early, as its imports take seconds. This module imports nothing slow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple, Self

_WORKER = f"{__package__}.compile_worker_triton"


class Specialization(NamedTuple):
    """One specialisation of a kernel: its module, name, and Triton's description in JSON."""

    module: str
    name: str
    data: str


class Target(NamedTuple):
    """The compilation target, as Triton's GPUTarget."""

    backend: str
    arch: int | str
    warp_size: int


class CompilationFailed(RuntimeError):
    """The compile process failed; launching the kernel shows whether the kernel is at fault."""


class CompileProcess:
    """Context manager of a process that compiles once."""

    def __init__(self) -> None:
        # It forks after importing torch; a library's threads would not survive the fork.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # its own group, shared with its forks
        )

    def start(self, kernels: Sequence[Specialization], target: Target, num_at_once: int) -> None:
        """Start compiling the kernels into Triton's cache on disk."""
        # The stream stays open until close(): its end signals that the owner is gone.
        with suppress(BrokenPipeError):  # it has ended; wait() reports why
            print(json.dumps([target, num_at_once, kernels]), file=self._process.stdin, flush=True)

    def wait(self) -> None:
        """Return once all kernels are compiled.

        Raises CompilationFailed with the compiler's message.
        """
        assert self._process.stderr is not None
        said = self._process.stderr.read()  # ends when all forks have ended
        if status := self._process.wait():
            reason = said.strip()[-2000:] or f"its process ended with status {status}"
            raise CompilationFailed(f"a kernel does not compile: {reason}")

    def close(self) -> None:
        """Kill the process and its forks."""
        if self._process.returncode is None:  # else the group id may have been reused
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError), self._process:  # closes the streams, discarding what was not read
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
