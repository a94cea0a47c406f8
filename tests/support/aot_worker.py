"""The process that compiles kernels for tests: `python -m tests.support.aot_worker FOLDER`, which aot.py starts.

FOLDER has requests.json; GROUP.json is written there for each group of variants, and its name then printed.
"""

from __future__ import annotations

import importlib
import json
import re
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

H200 = GPUTarget("cuda", 90, 32)


def compile_group(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fields of aot.Compiled for each variant."""
    kernels = {name: _compile(variant) for name, variant in variants.items()}
    listings = disassemble([kernel.asm["cubin"] for kernel in kernels.values()])
    return {
        name: {**_resources(kernel.asm["cubin"]), "ptx": kernel.asm["ptx"], "listing": listing}
        for (name, kernel), listing in zip(kernels.items(), listings, strict=True)
    }


def _compile(variant: Mapping[str, Any]) -> Any:
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
    return triton.compile(source, target=H200, options=variant["options"])


def _resources(cubin: bytes) -> dict[str, int]:
    said = _run_on(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"]}


def disassemble(cubins: Sequence[bytes]) -> list[list[tuple[int, str]]]:
    """Address and text of each kernel's instructions, the targets of branches counted from its beginning.

    The disassembler takes a quarter of a second for whatever it is given, so it is given all code as one.
    """
    codes = [_code(cubin) for cubin in cubins]
    said = _run_on(b"".join(codes), knobs.nvidia.nvdisasm.path, "--binary", "SM90a")
    lines = iter(re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;", said, re.M))
    listings, base = [], 0
    for code in codes:
        own = [next(lines) for _ in range(len(code) // 16)]
        listings.append([(int(address, 16) - base, _moved(text, base)) for address, text in own])
        base += len(code)
    assert not list(lines)
    return listings


def _moved(text: str, base: int) -> str:
    """The instruction with a branch's target counted from `base`."""
    return re.sub(r"(\bBRA\b.* 0x)([0-9a-f]+)$", lambda match: f"{match[1]}{int(match[2], 16) - base:x}", text)


def _code(cubin: bytes) -> bytes:
    """The machine code in a cubin, which is an ELF file with one kernel."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    names_at = sections[names][4]
    found = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names_at + name)
    ]
    assert len(found) == 1, f"a cubin has {len(found)} sections of code"
    return found[0]


def _run_on(content: bytes, *command: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "content")
        path.write_bytes(content)
        return subprocess.run([*command, str(path)], capture_output=True, text=True, check=True).stdout


def main() -> None:
    folder = Path(sys.argv[1])
    for group, variants in json.loads((folder / "requests.json").read_text()).items():
        try:
            answer = {"compiled": compile_group(variants)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        (folder / f"{group}.json").write_text(json.dumps(answer))
        print(group, flush=True)


if __name__ == "__main__":
    main()
