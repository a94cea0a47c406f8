"""The source distribution and the wheel made from it hold what a user needs, and the wheel imports where it lands."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "quant", "replicas", "cluster", "deploy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# What the build reads; copied first, because setuptools writes build/ and *.egg-info beside its sources.
SOURCES = (*FOLDERS, "__init__.py", "py.typed", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel): the wheel is built from the unpacked sdist, without a network, in a folder with a space."""
    work = tmp_path_factory.mktemp("source tree")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, work / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", work / "dist", ".", cwd=work)
    (sdist,) = (work / "dist").glob("*.tar.gz")
    (wheel,) = (work / "dist").glob("*.whl")
    return sdist, wheel


def shipped_files() -> set[str]:
    """Paths below the package: code, py.typed, configurations, tuned launches, the tiny model."""
    code = {path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    data = {*(ROOT / "deploy").glob("*.yaml"), *(ROOT / "deploy" / "models" / "tiny").glob("*")}
    data |= {*(ROOT / "kernels" / "tuned").glob("*.json"), ROOT / "py.typed"}
    return {path.relative_to(ROOT).as_posix() for path in code | data if path.is_file()} | {"__init__.py"}


def test_the_wheel_holds_code_configurations_and_the_tiny_model(built: tuple[Path, Path]) -> None:
    names = {name.removeprefix("shoal/") for name in zipfile.ZipFile(built[1]).namelist() if name.startswith("shoal/")}
    assert names == shipped_files()


def test_the_sdist_can_make_that_wheel_and_has_the_licence(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert shipped_files() | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_the_metadata(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        text = wheel.read(name).decode()
        assert any(entry.endswith("licenses/LICENSE") for entry in wheel.namelist())
    lines = text.splitlines()
    assert {"Name: shoal", "License-Expression: Apache-2.0", f"Version: {PROJECT['project']['version']}"} <= set(lines)
    # Only the extra may bring NCCL: beside a torch for CUDA 13 the two wheels would write the same file.
    nccl = [line for line in lines if line.startswith("Requires-Dist") and "nccl" in line]
    assert len(nccl) == 1
    assert 'extra == "cuda12"' in nccl[0]


def test_the_wheel_installs_and_imports(built: tuple[Path, Path], tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, built[1], cwd=tmp_path)
    code = (
        "import shoal, shoal.replicas.protocol, shoal.cluster.router.router, shoal.deploy.cli\n"
        f"assert shoal.__version__ == {PROJECT['project']['version']!r}, shoal.__version__\n"
        "print(shoal.deploy.cli.__file__)"
    )
    # The path comes before the development install, which this test must not import.
    env = os.environ | {"PYTHONPATH": str(target)}
    where = run(sys.executable, "-c", code, cwd=tmp_path, env=env)
    assert where.strip() == str(target / "shoal" / "deploy" / "cli.py")


def closure(requirements: list[str]) -> set[str]:
    """Names of the installed distributions that `requirements` bring, followed through their own requirements."""
    found: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        for wanted in {"", *requirement.extras}:
            if (name, wanted) in found:
                continue
            found.add((name, wanted))
            try:
                waiting += [(Requirement(text), wanted) for text in metadata.requires(name) or []]
            except metadata.PackageNotFoundError:
                continue  # for another platform, or an extra of a dependency that is not used here
    return {name for name, _ in found}


def imported(*folders: str) -> dict[str, str]:
    """Third-party modules by name, and one file that imports each."""
    own = {"shoal", "tests", "benchmarks", *FOLDERS}
    modules: dict[str, str] = {}
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                modules.setdefault(name.partition(".")[0], path.relative_to(ROOT).as_posix())
    return {name: where for name, where in modules.items() if name not in own | sys.stdlib_module_names}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [(FOLDERS, ()), (("tests", "benchmarks", "examples"), ("test", "bench"))],
    ids=["code", "tests"],
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    project = PROJECT["project"]
    declared = list(project["dependencies"])
    for extra in extras:
        declared += project["optional-dependencies"][extra]
    available = closure(declared)
    distributions = metadata.packages_distributions()
    missing = {
        name: where
        for name, where in imported(*folders).items()
        if not available & {canonicalize_name(dist) for dist in distributions.get(name, [name])}
    }
    assert missing == {}, "add them to pyproject.toml"
