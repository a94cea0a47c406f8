"""Which implementation runs, and what a process that needs no Triton does not load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of, use_backend

# Every operator with a kernel, through the layers that call them.
CPU_STEP = """
import sys, torch
from shoal.kernels.attention.block_copy import block_copy
from shoal.kernels.attention.kv_store import rope_kv_store, store_rows
from shoal.kernels.linear.rms_norm import add_rms_norm, rms_norm
from shoal.kernels.attention.rope import rope_rows
from shoal.kernels.linear.silu_mul import silu_mul
import shoal.replicas.models.decoder
x, slots = torch.ones(2, 8), torch.tensor([1, 2])
rms_norm(x, torch.ones(8), 1e-6), add_rms_norm(x, x.clone(), torch.ones(8), 1e-6), silu_mul(x)
cache = torch.zeros(3, 2, 1, 4, 8)
rows = rope_rows(torch.ones(4, 8), slots, torch.float32)
rope_kv_store(torch.ones(2, 3, 8), 1, rows, cache, store_rows(slots, 1, 4))
block_copy(cache, slots, slots - 1)
sys.exit("triton was loaded" if any(name.split(".")[0] == "triton" for name in sys.modules) else 0)
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_the_device_decides():
    assert backend_of(torch.empty(0)) is Backend.TORCH


@pytest.mark.gpu
def test_triton_runs_on_cuda():
    assert backend_of(torch.empty(0, device="cuda")) is Backend.TRITON


def test_a_choice_holds_inside_its_block_and_thread_alone():
    x, seen = torch.empty(0), []
    with use_backend(Backend.TRITON):
        with use_backend(Backend.TORCH):
            assert backend_of(x) is Backend.TORCH
        assert backend_of(x) is Backend.TRITON
        thread = threading.Thread(target=lambda: seen.append(backend_of(x)))
        thread.start()
        thread.join()
    assert seen == [Backend.TORCH]
    with pytest.raises(KeyError), use_backend(Backend.TRITON):
        raise KeyError
    assert backend_of(x) is Backend.TORCH


def test_a_cpu_process_loads_no_triton():
    done = _run(CPU_STEP)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_must_be_asked_for_before_triton_is_imported():
    done = _run("from shoal.kernels.backend import *\nwith use_backend(Backend.INTERPRET): pass")
    assert done.returncode == 1
    assert "RuntimeError: Triton does not interpret here; set TRITON_INTERPRET=1" in done.stderr
