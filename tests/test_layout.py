"""The shape of the source tree: folders, packages, lengths and names.

import-linter checks the order of imports and the third-party packages of each folder (`[tool.importlinter]`, run by
`make check`). The tests here check what its contracts cannot say, and list all findings at once. The rules are those
of docs/architecture.md: change that page together with a rule.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

FOLDERS = ("kernels", "quant", "replicas", "cluster", "deploy")

STANDARD_LIBRARY_ONLY = (
    "replicas/protocol.py",
    "replicas/config.py",
    "replicas/errors.py",
    "replicas/stages.py",
    "replicas/model_spec.py",
    "replicas/kv_cache_spec.py",
)

# Modules that routers, the ingress and the command line load: none of them may import torch.
WITHOUT_TORCH = (
    "replicas.protocol",
    "replicas.config",
    "replicas.errors",
    "replicas.plan",
    "replicas.text.tokenizer",
    "replicas.models.checkpoint",
    "replicas.models.families",
    "cluster.wire.frames",
    "cluster.wire.directory",
    "cluster.router.policies",
    "cluster.router.router",
    "cluster.replica.replica",
    "deploy.config",
    "deploy.openai.schema",
    "deploy.openai.http_app",
    "deploy.app",
    "deploy.server.launcher",
    "deploy.resources",
    "deploy.doctor.run",
    "deploy.cli",
)

MAX_LINES = 450


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE = source_files(*FOLDERS)
EVERYTHING = CODE + source_files("tests", "benchmarks", "examples")


@cache
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


class Import(NamedTuple):
    line: int
    module: str  # a relative one is given as shoal.<folder>.<module>
    is_relative: bool


def imports(path: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions too."""
    package = ("shoal", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.lineno, node.module or "", False)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            tails = [node.module] if node.module else [alias.name for alias in node.names]
            for tail in tails:
                yield Import(node.lineno, ".".join((*base, tail)), True)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` from the repository root, which is then on sys.path."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_there_is_code_in_every_folder() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in CODE} == set(FOLDERS)


def test_top_level_folders_have_no_init() -> None:
    """Such a file makes `kernels` importable wherever the root is on sys.path (docs/adr/0001)."""
    assert [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()] == []


def test_nested_packages_have_an_init() -> None:
    nested = {path.parent for path in CODE if path.parent.parent != ROOT}
    assert [relative(folder) for folder in sorted(nested) if not (folder / "__init__.py").exists()] == []


def test_packages_in_pyproject_are_the_folders_on_disk() -> None:
    on_disk = {"shoal"} | {".".join(("shoal", *path.relative_to(ROOT).parent.parts)) for path in CODE}
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == on_disk


def test_the_root_on_sys_path_does_not_break_transformers() -> None:
    """transformers imports Hugging Face's `kernels`; a package of that name at the root would take its place."""
    done = run_python("import sys; assert '' in sys.path; import transformers.integrations.hub_kernels")
    assert done.returncode == 0, done.stderr


def test_the_contract_of_layers_names_every_package() -> None:
    """A package that the contract leaves out would be free to import anything."""
    contracts = pyproject()["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "layers")
    named = [name for layer in layers for name in re.split(r" [|:] ", layer)]
    on_disk = {".".join(("shoal", *path.relative_to(ROOT).with_suffix("").parts[:2])) for path in CODE}
    assert on_disk - set(named) == set(), "add these to the layers of [tool.importlinter] in pyproject.toml"
    assert sorted(named) == sorted(on_disk)


def test_imports_inside_are_relative() -> None:
    bad = [
        f"{relative(path)}:{line} {module}"
        for path in CODE
        for line, module, is_relative in imports(path)
        if not is_relative and module.split(".")[0] in {"shoal", "tests", *FOLDERS}
    ]
    assert bad == [], "import these relatively"


def test_the_seams_import_only_the_standard_library() -> None:
    own = {"shoal." + other.removesuffix(".py").replace("/", ".") for other in STANDARD_LIBRARY_ONLY}
    bad = [
        f"{name}:{line} {module}"
        for name in STANDARD_LIBRARY_ONLY
        for line, module, _ in imports(ROOT / name)
        if module not in own and module.split(".")[0] not in sys.stdlib_module_names
    ]
    assert bad == []


def test_edge_modules_do_not_load_torch() -> None:
    """One after the other in one process: the first that loads torch is the one at fault."""
    code = f"""
import importlib, sys
for module in {WITHOUT_TORCH}:
    importlib.import_module(f"shoal.{{module}}")
    assert "torch" not in sys.modules, f"{{module}} loads torch"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}, "split these by idea"


GLOSSARY = """
request, sequence, prefill, decode, chunk, step, continuous batching, dynamic batching, block, block_size, block_id,
block_table, slot, cu_seqlens_q, context_lens, rank, world size, tp_rank, pp_rank, local_rank, shard, shard group,
replica, router, directory, preempt, evict, free, scale, zero_point, group_size, qweight, w4a16, w8a8, kv8, TTFT, TPOT,
ITL, goodput
"""


def test_the_glossary_defines_every_term() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    defined = {term.strip("`") for line in re.findall(r"^\*\*(.+?)\*\*", text, re.M) for term in line.split(", ")}
    assert set(re.split(r",\s+", GLOSSARY.strip())) - defined == set(), "add an entry **term** to docs/glossary.md"


# Names that the glossary replaces: `page` by block, `n_heads` by num_heads.
UNWANTED_NAME = re.compile(r"(^|_)pages?(_|$)|^(n|nb|cnt)_[a-z]")


def defined_names(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def test_names_use_the_glossary() -> None:
    bad = [
        f"{relative(path)}:{line} {name}"
        for path in CODE
        for line, name in defined_names(path)
        if UNWANTED_NAME.search(name)
    ]
    assert bad == [], "say block, and num_ for counts (docs/glossary.md)"
