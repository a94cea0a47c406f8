"""Kernels that steps will launch are found without launching any, and compiled as the launch would have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.support.checkpoints import FAMILIES


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> dict:
    folder = FAMILIES["mixtral"](tmp_path_factory.mktemp("model"))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }
    command = [sys.executable, "-m", "tests.support.rehearsed", str(folder), "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_operator_of_a_step_is_rehearsed(rehearsed):
    for part in ("apply_plan", "expand_plan", "rms_norm", "rope_kv_store", "paged_decode", "paged_prefill", "experts",
                 "sample", "keep_tokens", "apply_penalties", "count_tokens", "score_chunks"):  # fmt: skip
        assert any(part in name for name in rehearsed["names"]), part
    assert rehearsed["same"], "a rehearsal leaves nothing behind"
    assert rehearsed["launches"] == "KernelInterface.__getitem__", "afterwards kernels are launched again"


def test_a_launch_finds_what_was_compiled(rehearsed):
    assert rehearsed["compiled"] == 2
    assert rehearsed["again"] == 0, "what is there is not compiled again"
    assert rehearsed["hits"] == [True, True]


def test_a_launch_finds_what_was_compiled_by_gluon(rehearsed):
    assert rehearsed["gluon"] == ["_stream_kernel"]
    assert rehearsed["gluon hits"] == [True]


def test_no_number_of_samples_needs_a_kernel_of_its_own(rehearsed):
    """Steps that are too large for a graph have any number: each new kernel would hold one up for a second."""
    assert rehearsed["late"] == []


def test_a_kernel_that_does_not_compile_is_told():
    from triton.backends.compiler import GPUTarget

    from shoal.kernels.compile_triton import CompilationFailed, Specialization, _run_compilers

    wrong = Specialization("shoal.kernels.rms_norm_triton", "no_such_kernel", "{}")
    with pytest.raises(CompilationFailed, match="no_such_kernel"):
        _run_compilers([[wrong], []], GPUTarget("cuda", 90, 32))
