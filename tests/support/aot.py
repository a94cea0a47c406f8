"""Triton kernels compiled for sm_90a ahead of time, without a GPU: what they take and what they execute.

A memory-bound kernel has an instruction budget per thread. At the full HBM speed of an H200, its 132 SMs issue 15.6
thread instructions for each bf16 element read or written, 7.8 for an 8-bit and 3.9 for a 4-bit element. Count a kernel
without loops by `thread_instructions(kernel.sass, ...)`, and a loop by `thread_instructions(kernel.loops[i], ...)` with
the elements of one iteration.

Kernels are compiled in a separate process (aot_worker.py): under TRITON_INTERPRET, which tests without a GPU set,
`triton.jit` makes no compilable kernel. The process works while other tests run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel. Pointers are taken as 16-byte aligned.

    Arguments that are neither in `types` nor in `constants` are int32; those called stride_* are multiples of 16, and
    so are those of type "i32/16".
    """

    kernel: str  # module:function
    types: Mapping[str, str]  # "*bf16", "fp32", "i32/16", ...
    constants: Mapping[str, int | bool]
    options: Mapping[str, int] = field(default_factory=dict)  # num_warps, num_stages


class Instruction(NamedTuple):
    """One machine instruction, `@!P0 LDG.E.128 R8, desc[UR4][R14.64]`: its address in the kernel, opcode and text."""

    address: int
    opcode: str
    text: str

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for any other instruction."""
        found = re.search(r"\bBRA(?:\.\S+)? (?:\S+, )*0x([0-9a-f]+)$", self.text)
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    spilled: int  # bytes of a thread's registers that are kept in local memory
    ptx: str = field(repr=False)
    listing: Sequence[tuple[int, str]] = field(repr=False)  # address and text of each machine instruction, in order

    @cached_property
    def sass(self) -> tuple[Instruction, ...]:
        """The machine code, in order, less the padding at its end."""
        found = [
            Instruction(address, text.split()[text.startswith("@")], text)  # after a guard comes the opcode
            for address, text in self.listing
        ]
        while found[-1].opcode == "NOP" or found[-1].target == found[-1].address:
            found.pop()
        return tuple(found)

    @cached_property
    def loops(self) -> tuple[tuple[Instruction, ...], ...]:
        """The bodies of the innermost loops, in order: what stands between a branch backwards and its target."""
        jumps = [(each.target, each.address) for each in self.sass]
        ends = [(target, address) for target, address in jumps if target is not None and target < address]
        inner = [(a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)]
        return tuple(tuple(each for each in self.sass if a <= each.address <= b) for a, b in inner)

    def count(self, *opcodes: str) -> int:
        """Instructions whose opcode is one of `opcodes` or begins with it and a dot: LDG, LDG.E.128, HGMMA."""
        return sum(f"{each.opcode}.".startswith(tuple(f"{o}." for o in opcodes)) for each in self.sass)


def thread_instructions(body: Sequence[Instruction], num_warps: int, num_elements: int) -> float:
    """Thread instructions per element in `body`, for `num_elements` that a program's warps handle."""
    return len(body) * 32 * num_warps / num_elements


class AheadCompiler:
    """Compiles groups of variants, one group after the other, from now on. A context that ends the process.

    What was compiled is kept for this object alone: a kernel that is edited is compiled again by the next one.
    """

    def __init__(self, groups: Mapping[str, Mapping[str, Variant]]) -> None:
        self._pending = set(groups)
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # of what it was compiling
        folder = Path(self._folder.name)
        requests = {
            group: {name: asdict(each) for name, each in variants.items()} for group, variants in groups.items()
        }
        (folder / "requests.json").write_text(json.dumps(requests))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        environment["TRITON_CACHE_DIR"] = str(folder / "cache")
        with (folder / "stderr").open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.aot_worker", str(folder)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def results(self, group: str) -> dict[str, Compiled]:
        """Waits until all of the group is compiled. Raises AssertionError with the compiler's message."""
        assert self._process.stdout is not None
        folder = Path(self._folder.name)
        while group in self._pending:
            done = self._process.stdout.readline().strip()
            assert done, f"the compiling process has ended: {(folder / 'stderr').read_text()}"
            self._pending.remove(done)
        found = json.loads((folder / f"{group}.json").read_text())
        assert "error" not in found, found["error"]
        return {name: Compiled(**each) for name, each in found["compiled"].items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()
        self._folder.cleanup()
