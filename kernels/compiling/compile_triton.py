"""Kernels compiled before their first launch, many at a time.

Triton compiles a kernel at its first launch, a second each and one at a time. A model has some fifty,
and the GPU would wait for them. `dry_run` notes what would be launched, without launching or compiling anything;
`compile_kernels` has it compiled on all cores, into Triton's cache on disk, where the launch then finds it.
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


def compile_kernels(kernels: set[Specialization], process: CompileProcess, num_at_once: int) -> int:
    """Compile into the cache on disk what is not there; returns how many kernels that were.

    process: one that has compiled nothing yet. Raises CompilationFailed with the compiler's message where one does not
    compile.
    """
    current: GPUTarget = triton.runtime.driver.active.get_current_target()  # pyright: ignore[reportAssignmentType]
    target = Target(current.backend, current.arch, current.warp_size)
    done = _Ledger(target)
    missing = sorted(kernels - done.find(kernels))
    if missing:
        process.start(missing, target, min(num_at_once, len(missing)))
        triton_key()  # the first launch would ask for it: it takes most of a second, and is kept
        process.wait()
        done.add(missing)
    return len(missing)


class _Ledger:
    """Which kernels the cache on disk has, by a file for each beside it: to ask the cache itself takes 20 ms a kernel.

    A file's name is the hash of the kernel, of the source of all of them, of the target and of Triton's version. It
    goes with the cache when that is removed.
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
