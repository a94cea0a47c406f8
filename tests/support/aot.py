"""Compile Triton kernels for sm_90 ahead of time, without a GPU, and read what they take.

In a process of its own: under TRITON_INTERPRET, which tests without a GPU set, `triton.jit` makes no compilable kernel.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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


@dataclass(frozen=True)
class Compiled:
    registers: int  # of a thread
    spilled: int  # bytes of a thread's registers that are kept in local memory
    ptx: str


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
    return {name: Compiled(**result) for name, result in json.loads(done.stdout).items()}


def _compile(variant: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=variant["options"])
    return {**_resources(compiled.asm["cubin"]), "ptx": compiled.asm["ptx"]}


def _resources(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


if __name__ == "__main__":
    requests = json.load(sys.stdin)
    json.dump({name: _compile(variant) for name, variant in requests.items()}, sys.stdout)
