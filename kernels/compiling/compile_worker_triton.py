"""The process that compiles kernels, started by compile_process.py with `python -m`.

It reads the kernels as one line from standard input and reports errors on standard error, with status 1. It leads a
process group, which ends with its input. Imports run once, before the line arrives and before the forks.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import triton_key

from .compile_process import Specialization

_INDEX_BYTES = 2


def compile_kernel(kernel: Specialization, target: GPUTarget) -> None:
    """Compile as Triton does for a launch, without a device: the cache gets the launch's key."""
    data = json.loads(kernel.data)
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    constants = {
        tuple(path): _constant(value) for path, value in zip(data["constant_keys"], data["constant_vals"], strict=True)
    }
    attributes = {tuple(path): value for path, value in zip(data["attrs_keys"], data["attrs_vals"], strict=True)}
    signature = {name: _tuples(kind) for name, kind in data["signature"].items()}
    options = make_backend(target).parse_options({name: _tuples(value) for name, value in data["options"].items()})
    source = (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    if hasattr(nvidia, "make_launcher"):
        # Before 3.7 Triton compiles a launcher per signature with the system's C compiler, at the first launch.
        nvidia.CudaLauncher(source, compiled.metadata)


def _constant(value: Any) -> Any:
    if tl.dtype.is_dtype(value):
        return tl.dtype(value)
    return tl.constexpr(value["constexpr"]) if isinstance(value, dict) and "constexpr" in value else value


def _tuples(value: Any) -> Any:
    """JSON has lists where Triton has tuples."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def _get_ready() -> None:
    kernels = Path(__file__).parents[1]
    for path in sorted(kernels.rglob("*_triton.py")):
        inside = path.relative_to(kernels).with_suffix("").parts
        importlib.import_module(".." + ".".join(inside), __package__)
    triton_key()  # a hash over all of Triton, part of every kernel's key: most of a second, then cached


def _compile_all(kernels: Sequence[Specialization], target: GPUTarget, num_processes: int) -> bool:
    """Whether all compile. Processes take kernels one by one: some take ten times as long."""
    taken, given = os.pipe()
    os.write(given, b"".join(index.to_bytes(_INDEX_BYTES) for index in range(len(kernels))))
    os.close(given)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_compile_next, args=(taken, kernels, target)) for _ in range(num_processes)]
    for process in processes:
        process.start()
    owner, running = sys.stdin.fileno(), {process.sentinel for process in processes}
    while running:
        ended = set(wait([owner, *running]))
        if owner in ended:  # the owner has exited
            os.killpg(os.getpid(), signal.SIGKILL)
        running -= ended
    for process in processes:
        process.join()
    return not any(process.exitcode for process in processes)


def _compile_next(taken: int, kernels: Sequence[Specialization], target: GPUTarget) -> None:
    while index := os.read(taken, _INDEX_BYTES):
        compile_kernel(kernels[int.from_bytes(index)], target)


def main() -> None:
    _get_ready()
    said = sys.stdin.readline()
    if said.endswith("\n"):  # else the parent process has exited
        target, num_processes, kernels = json.loads(said)
        all_compile = _compile_all([Specialization(*kernel) for kernel in kernels], GPUTarget(*target), num_processes)
        sys.exit(0 if all_compile else 1)


if __name__ == "__main__":
    main()
