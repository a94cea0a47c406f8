"""Every device function says in one line what it computes."""

from __future__ import annotations

import ast
from pathlib import Path

import shoal


def test_every_device_function_has_a_docstring():
    found, missing = 0, []
    for file in sorted((Path(shoal.__file__).parent / "kernels").rglob("*_triton.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            names = {ast.unparse(each).split("(")[0] for each in node.decorator_list}
            if names & {"triton.jit", "gluon.jit"}:
                found += 1
                docstring = ast.get_docstring(node) or ""
                if not docstring.partition("\n")[0].strip():
                    missing.append(f"{file.name}:{node.lineno} {node.name}")
    assert found > 100
    assert not missing
