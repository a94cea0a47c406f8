"""Compile Triton kernels for sm_90a ahead of time, without a GPU, and read what they take and what they execute.

A kernel that is bound by memory has a budget: at the full HBM speed of an H200 its 132 multiprocessors issue 15.6
instructions of a lane for each bf16 element that is read or written, 7.8 for an 8-bit one, 3.9 for a 4-bit one. Count a
kernel without loops by `lane_instructions(kernel.sass, ...)`, one with a loop by `lane_instructions(kernel.loops[i],
...)` and the elements of one turn.

In a process of its own: under TRITON_INTERPRET, which tests without a GPU set, `triton.jit` makes no compilable kernel.
"""

from __future__ import annotations

import base64
import importlib
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
from typing import Any, NamedTuple


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
    """One machine instruction, `@!P0 LDG.E.128 R8, desc[UR4][R14.64]`: its address in the kernel, opcode and line."""

    address: int
    opcode: str
    text: str


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    spilled: int  # bytes of a thread's registers that are kept in local memory
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)

    @cached_property
    def sass(self) -> tuple[Instruction, ...]:
        """The machine code, in order, less the padding at its end. Disassembled when first asked for: half a second."""
        found = []
        for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;", _cuobjdump(self.cubin, "-sass"), re.M):
            guarded = text.startswith("@")
            found.append(Instruction(int(address, 16), text.split()[guarded], text))
        while found[-1].opcode == "NOP" or _jump(found[-1]) == found[-1].address:
            found.pop()
        return tuple(found)

    @cached_property
    def loops(self) -> tuple[tuple[Instruction, ...], ...]:
        """The bodies of the innermost loops, in order: what stands between a branch backwards and its target."""
        ends = [(jump, each.address) for each in self.sass if (jump := _jump(each)) is not None and jump < each.address]
        inner = [(a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)]
        return tuple(tuple(each for each in self.sass if a <= each.address <= b) for a, b in inner)

    def count(self, *opcodes: str) -> int:
        """Instructions whose opcode is one of `opcodes` or begins with it and a dot: LDG, LDG.E.128, HGMMA."""
        return sum(f"{each.opcode}.".startswith(tuple(f"{o}." for o in opcodes)) for each in self.sass)


def lane_instructions(body: Sequence[Instruction], num_warps: int, num_elements: int) -> float:
    """Instructions of a lane for each of the `num_elements` that a program's warps handle in `body`."""
    return len(body) * 32 * num_warps / num_elements


def compile_variants(variants: Mapping[str, Variant]) -> dict[str, Compiled]:
    """Compiles all in one process. Raises AssertionError with the compiler's message."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps({name: asdict(variant) for name, variant in variants.items()}),
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
    assert done.returncode == 0, done.stderr
    return {
        name: Compiled(**result, cubin=base64.b64decode(cubin))
        for name, (cubin, result) in json.loads(done.stdout).items()
    }


def _compile(variant: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, _, name = variant["kernel"].partition(":")
    kernel = getattr(importlib.import_module(module), name)
    types, constants = variant["types"], variant["constants"]
    unknown = (types.keys() | constants.keys()) - set(kernel.arg_names)
    assert not unknown, f"{variant['kernel']} has no arguments {unknown}"
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        default = "i32/16" if argument.startswith("stride_") else "i32"
        kind = "constexpr" if argument in constants else types.get(argument, default)
        signature[argument] = kind.removesuffix("/16")
        if kind.startswith("*") or kind.endswith("/16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=variant["options"])
    cubin = compiled.asm["cubin"]
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump(cubin, "--dump-resource-usage")))
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    result = {"registers": int(found["REG"]), "spilled": spilled, "ptx": compiled.asm["ptx"]}
    return base64.b64encode(cubin).decode(), result


def _cuobjdump(cubin: bytes, option: str) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _jump(instruction: Instruction) -> int | None:
    """Where a branch goes, None for any other instruction."""
    target = re.search(r"\bBRA(?:\.\S+)? (?:\S+, )*0x([0-9a-f]+)$", instruction.text)
    return int(target[1], 16) if target else None


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    json.dump({name: _compile(variant) for name, variant in requests.items()}, sys.stdout)
