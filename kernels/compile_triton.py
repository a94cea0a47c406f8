"""Kernels compiled before their first launch, many at a time.

Triton compiles a kernel when it is first launched, a second each and one after the other, and a model has some ninety
of them: a minute, for a GPU that waits. `rehearsal` notes what would be launched, without launching or compiling
anything; `compile_kernels` has it compiled by one process a core, into Triton's cache on disk, where the launch then
finds it.

`python -m shoal.kernels.compile_triton` is such a process: kernels on its standard input, nothing on its output.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

_KERNELS_OF_A_PROCESS = 4  # at least: to start one takes as long as to compile three


class Specialization(NamedTuple):
    """A kernel as one kind of launch needs it: its module and name, and Triton's description of the kind, in JSON."""

    module: str
    name: str
    data: str


class CompilationFailed(RuntimeError):
    """A compiling process failed; the launch of the kernel will tell whether the kernel is at fault."""


@contextmanager
def rehearsal() -> Iterator[set[Specialization]]:
    """Inside, no Triton kernel of this process is launched: those that were not compiled yet are noted in the result.

    What they would have written stays undefined; operators must not read it on the host. Triton has a hook for what it
    is about to compile, and launches "for warm-up" that end before the launch; it is asked for the second here.
    """
    noted: set[Specialization] = set()

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        noted.add(Specialization(fn.module, fn.name, compile["specialization_data"]))
        return True  # as if there were nothing to compile

    def warm_up(self: JITFunction[Any], grid: Any) -> Any:
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=True, **kwargs)

    with _replaced(JITFunction, "__getitem__", warm_up), _replaced(knobs.runtime, "jit_cache_hook", note):
        yield noted


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def compile_kernels(kernels: set[Specialization], num_processes: int) -> int:
    """Compile into the cache on disk what is not there; returns how many kernels that were.

    Raises CompilationFailed with the compiler's message where one does not compile.
    """
    target: GPUTarget = triton.runtime.driver.active.get_current_target()  # pyright: ignore[reportAssignmentType]
    done = _Ledger(target)
    missing = sorted(kernels - done.find(kernels))
    if missing:
        num_processes = min(num_processes, -(-len(missing) // _KERNELS_OF_A_PROCESS))
        _run_compilers([missing[i::num_processes] for i in range(num_processes)], target)
        done.add(missing)
    return len(missing)


class _Ledger:
    """Which kernels the cache on disk has, by a file for each beside it: to ask the cache itself takes 20 ms a kernel.

    A file's name is the hash of the kernel, of the source of all of them, of the target and of Triton's version. It
    goes with the cache when that is removed.
    """

    def __init__(self, target: GPUTarget) -> None:
        self._folder = Path(knobs.cache.dir, "shoal")
        sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        self._common = hashlib.sha256(f"{triton.__version__} {target}".encode() + sources).hexdigest()

    def find(self, kernels: set[Specialization]) -> set[Specialization]:
        return {kernel for kernel in kernels if self._file(kernel).exists()}

    def add(self, kernels: Sequence[Specialization]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for kernel in kernels:
            self._file(kernel).touch()

    def _file(self, kernel: Specialization) -> Path:
        return self._folder / hashlib.sha256(" ".join((self._common, *kernel)).encode()).hexdigest()


def _run_compilers(shares: Sequence[Sequence[Specialization]], target: GPUTarget) -> None:
    """One process for each share; all have ended when this returns or raises."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in shares
    ]
    try:
        for process, share in zip(processes, shares, strict=True):
            assert process.stdin is not None
            json.dump([[target.backend, target.arch, target.warp_size], share], process.stdin)
            process.stdin.close()
            process.stdin = None  # communicate() must not flush what is closed
        failed = [said for process in processes if (said := process.communicate()[1]) and process.returncode]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if failed:
        raise CompilationFailed(f"a kernel does not compile: {failed[0].strip()[-2000:]}")


def _compile(kernel: Specialization, target: GPUTarget) -> None:
    """As Triton itself does it for a launch, on no device: the cache then has the launch's own key."""
    data = json.loads(kernel.data)
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    constants = {
        tuple(path): _constant(value) for path, value in zip(data["constant_keys"], data["constant_vals"], strict=True)
    }
    attributes = {tuple(path): value for path, value in zip(data["attrs_keys"], data["attrs_vals"], strict=True)}
    signature = {name: _tuples(kind) for name, kind in data["signature"].items()}
    options = make_backend(target).parse_options({name: _tuples(value) for name, value in data["options"].items()})
    source = (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, constants, attributes)
    triton.compile(source, target=target, options=options.__dict__)


def _constant(value: Any) -> Any:
    if tl.dtype.is_dtype(value):
        return tl.dtype(value)
    return tl.constexpr(value["constexpr"]) if isinstance(value, dict) and "constexpr" in value else value


def _tuples(value: Any) -> Any:
    """JSON has lists where Triton has tuples."""
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def main() -> None:
    target, kernels = json.load(sys.stdin)
    for kernel in kernels:
        _compile(Specialization(*kernel), GPUTarget(*target))


if __name__ == "__main__":
    main()
