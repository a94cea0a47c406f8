"""A process that compiles kernels, as its owner sees it.

It is started before there is anything to compile: until it has imported what compiling takes some seconds pass, which
its owner has other uses for. What runs in it is compile_worker_triton.py. Nothing is imported here that takes time.
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
    """A kernel as one kind of launch needs it: its module and name, and Triton's description of the kind, in JSON."""

    module: str
    name: str
    data: str


class Target(NamedTuple):
    """What kernels are compiled for, as Triton's GPUTarget has it."""

    backend: str
    arch: int | str
    warp_size: int


class CompilationFailed(RuntimeError):
    """A compiling process failed; the launch of the kernel will tell whether the kernel is at fault."""


class CompileProcess:
    """Compiles once, and is to be closed whether it has or not. A context that closes it."""

    def __init__(self) -> None:
        # It forks once torch is imported, and a library's threads would not be there in what it forks.
        one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,  # of its own, with what it forks
        )

    def start(self, kernels: Sequence[Specialization], target: Target, num_at_once: int) -> None:
        """Begin to compile the kernels into Triton's cache on disk."""
        # The stream stays open until close(): by its end the process knows that its owner is gone.
        with suppress(BrokenPipeError):  # it has ended, and wait() says why
            print(json.dumps([target, num_at_once, kernels]), file=self._process.stdin, flush=True)

    def wait(self) -> None:
        """Returns once all kernels are compiled.

        Raises CompilationFailed with the compiler's message where one does not compile.
        """
        assert self._process.stderr is not None
        said = self._process.stderr.read()  # its end is that of all that were forked, too
        if status := self._process.wait():
            reason = said.strip()[-2000:] or f"its process ended with status {status}"
            raise CompilationFailed(f"a kernel does not compile: {reason}")

    def close(self) -> None:
        """End the process and those that it has forked, whatever they do."""
        if self._process.returncode is None:  # else the group's number may be another's
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError), self._process:  # closes the streams; what was not read is of no use
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
