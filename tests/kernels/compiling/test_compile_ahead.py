"""Kernels that steps will launch are found without launching any, and compiled as the launch would have it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.backends.nvidia import driver as nvidia

from shoal.kernels.compiling.compile_process import CompilationFailed, CompileProcess, Specialization, Target
from tests.support.checkpoints import FAMILIES

H200 = Target("cuda", 90, 32)
# What the C sources of Triton's launchers call in CUDA's driver.
DRIVER = (
    "cuCtxGetCurrent", "cuCtxSetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuFuncSetAttribute",
    "cuGetErrorString", "cuPointerGetAttribute", "cuTensorMapEncodeTiled",
)  # fmt: skip


def needs_a_driver() -> bool:
    """Whether this Triton links what it compiles against CUDA's driver, and there is none."""
    try:
        return hasattr(nvidia, "make_launcher") and not nvidia.libcuda_dirs()
    except AssertionError:
        return True


def make_driver(folder: Path) -> dict[str, str]:
    """A library with the driver's names; returns the environment in which it is found."""
    source = folder / "driver.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in DRIVER))
    compiler = shutil.which("gcc") or "cc"
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(folder / "libcuda.so.1")], check=True)
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> dict:
    folder = FAMILIES["mixtral"](tmp_path_factory.mktemp("model"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }
    if needs_a_driver():
        environment |= make_driver(tmp_path_factory.mktemp("driver"))
    command = [sys.executable, "-m", "tests.support.dry_run", str(folder), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_operator_of_a_step_is_noted(dry_run):
    for part in ("apply_plan", "expand_plan", "rms_norm", "rope_kv_store", "paged_decode", "paged_prefill",
                 "experts", "sample", "store_tokens", "apply_penalties", "count_tokens", "score_chunks"):  # fmt: skip
        assert any(part in name for name in dry_run["names"]), part
    assert dry_run["same"], "a dry run leaves nothing behind"
    assert dry_run["launches"] == "KernelInterface.__getitem__", "afterwards kernels are launched again"


def test_layers_that_are_left_out_launch_nothing_else(dry_run):
    assert dry_run["forgotten"] == []


def test_a_launch_finds_what_was_compiled(dry_run):
    assert dry_run["compiled"] == 2
    assert dry_run["again"] == 0, "what is there is not compiled again"
    assert dry_run["hits"] == [True, True]


def test_a_launch_finds_what_was_compiled_by_gluon(dry_run):
    assert dry_run["gluon"] == ["_stream_kernel"]
    assert dry_run["gluon hits"]
    assert all(dry_run["gluon hits"])


def test_kernels_that_are_not_compiled_ahead_are_left_to_their_launch(dry_run):
    assert dry_run["compiled by none"] == 0


def test_no_number_of_samples_needs_a_kernel_of_its_own(dry_run):
    """Steps that are too large for a graph have any number: each new kernel would hold one up for a second."""
    assert dry_run["late"] == []


def test_a_kernel_that_does_not_compile_is_told():
    wrong = Specialization("shoal.kernels.linear.rms_norm_triton", "no_such_kernel", "{}")
    with CompileProcess() as process:
        process.start([wrong], H200, 2)
        with pytest.raises(CompilationFailed, match="no_such_kernel"):
            process.wait()


def test_a_compiling_process_that_is_killed_is_told():
    with CompileProcess() as process:
        process._process.kill()
        process._process.wait()
        process.start([Specialization("module", "kernel", "{}")], H200, 1)
        with pytest.raises(CompilationFailed, match="status -9"):
            process.wait()


def test_nothing_is_left_of_a_process_that_was_not_needed():
    with CompileProcess() as process:
        pass
    assert process._process.returncode == -signal.SIGKILL


def test_a_process_without_work_ends_with_its_owner():
    """Its owner may be killed, which closes its standard input."""
    with CompileProcess() as process:
        assert process._process.stdin is not None
        process._process.stdin.close()
        process.wait()


@pytest.fixture
def endless(tmp_path, monkeypatch) -> Path:
    """A pipe that has a line of each process that compiles a kernel of the module `endless`, which takes for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "endless.py").write_text(
        f"import signal\npipe = open({str(pipe)!r}, 'w')\nprint('here', file=pipe, flush=True)\nsignal.pause()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return pipe


ENDLESS = [Specialization("endless", name, "{}") for name in ("one", "two", "three")]


def test_what_was_forked_ends_when_it_is_closed(endless):
    with contextlib.ExitStack() as stack:
        with CompileProcess() as process:
            process.start(ENDLESS, H200, 2)
            said = stack.enter_context(endless.open())
            assert [said.readline() for _ in range(2)] == ["here\n"] * 2
        assert said.read() == "", "the pipe ends with the last process that has it"


def test_what_was_forked_ends_when_the_owner_is_killed(endless):
    program = f"""
from shoal.kernels.compiling.compile_process import *
with CompileProcess() as process:
    process.start([Specialization(*kernel) for kernel in {list(map(tuple, ENDLESS))}], Target(*{tuple(H200)}), 2)
    process.wait()
"""
    with (
        subprocess.Popen(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        ) as owner,
        endless.open() as said,
    ):
        assert [said.readline() for _ in range(2)] == ["here\n"] * 2
        owner.kill()
        owner.wait()
        assert said.read() == "", "the pipe ends with the last process that has it"
