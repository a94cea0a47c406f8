"""Which Triton kernels there are, read from their files."""

from __future__ import annotations

import ast
from pathlib import Path

import shoal


def kernel_names() -> set[str]:
    """The kernels of kernels/: decorated functions of its *_triton.py that end in _kernel."""
    files = (Path(shoal.__file__).parent / "kernels").rglob("*_triton.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list)
    return {function.name for function in functions if function.name.endswith("_kernel")}
