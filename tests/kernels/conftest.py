"""One test body for every backend: torch on the CPU, the Triton interpreter, Triton on a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of, use_backend


@pytest.fixture(params=["torch", "interpret", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test puts its tensors. On Triton, memory that torch.empty hands out is NaN (or the largest integer)."""
    if request.param == "torch":
        yield torch.device("cpu")
        return
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled in this process, not interpreted")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if request.param == "cuda":
            yield torch.device("cuda")
        else:
            with use_backend(Backend.INTERPRET):
                yield torch.device("cpu")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """Every dtype of a model that is computed rightly on `device`."""
    if request.param is torch.bfloat16 and backend_of(torch.empty(0, device=device)) is Backend.INTERPRET:
        pytest.skip("Triton's interpreter is silently wrong in bf16")
    return request.param
