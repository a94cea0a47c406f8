"""Parallel compilation of kernels before their first launch.

Triton compiles a kernel at its first launch, a second each, one at a time; a model has some fifty. `dry_run`
records the launches without compiling; `compile_kernels` compiles them on all cores into Triton's cache on
disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

from .compile_process import CompileProcess, Specialization, Target


@contextmanager
def dry_run() -> Iterator[set[Specialization]]:
    """Inside, this process launches no Triton kernel; uncompiled ones are recorded in the result.

    Outputs stay undefined: do not read them on the host. Uses Triton's hook before compilation,
    and its warm-up launches, which end before the launch.
    """
    noted: set[Specialization] = set()

    def note(*, fn: Any, compile: Any, **_: Any) -> bool:
        noted.add(Specialization(fn.module, fn.name, compile["specialization_data"]))
        return True  # skip compilation

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


def compile_kernels(kernels: set[Specialization], process: CompileProcess, num_at_once: int) -> int:
    """Compile what the cache on disk lacks; returns the number of kernels compiled.

    process: an unused one. Raises CompilationFailed with the compiler's message.
    """
    current: GPUTarget = triton.runtime.driver.active.get_current_target()  # pyright: ignore[reportAssignmentType]
    target = Target(current.backend, current.arch, current.warp_size)
    done = _Ledger(target)
    missing = sorted(kernels - done.find(kernels))
    if missing:
        process.start(missing, target, min(num_at_once, len(missing)))
        triton_key()  # cached; otherwise the first launch computes it, most of a second
        process.wait()
        done.add(missing)
    return len(missing)


class _Ledger:
    """Marker files beside the cache on disk, one per cached kernel: querying the cache takes 20 ms a kernel.

    A file's name hashes the kernel, all kernels' source, the target and Triton's version. It is removed with the
    cache.
    """

    def __init__(self, target: Target) -> None:
        self._folder = Path(knobs.cache.dir, "shoal")
        sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("*.py")))
        self._common = hashlib.sha256(f"{triton.__version__} {target}".encode() + sources).hexdigest()

    def find(self, kernels: set[Specialization]) -> set[Specialization]:
        return {kernel for kernel in kernels if self._file(kernel).exists()}

    def add(self, kernels: Sequence[Specialization]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for kernel in kernels:
            self._file(kernel).touch()

    def _file(self, kernel: Specialization) -> Path:
        return self._folder / hashlib.sha256(" ".join((self._common, *kernel)).encode()).hexdigest()
