"""One test body for every backend: torch on the CPU, the Triton interpreter, Triton on a CUDA device."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of, use_backend
from tests.support.aot import AheadCompiler, Compiled

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support.interpreter import search_once_a_launch

    search_once_a_launch()

AHEAD_COMPILER = pytest.StashKey[AheadCompiler]()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """What the tests of a session have compiled is begun with the first of them, on whatever core has nothing to do."""
    items = [item for item in session.items if "compiled" in getattr(item, "fixturenames", ())]
    modules = list(dict.fromkeys(item.module for item in items))
    if session.config.option.collectonly or not modules:
        return (yield)
    with AheadCompiler({module.__name__: module.VARIANTS for module in modules}) as compiler:
        session.config.stash[AHEAD_COMPILER] = compiler
        return (yield)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, Compiled]:
    """The module's VARIANTS, compiled."""
    return request.config.stash[AHEAD_COMPILER].results(request.module.__name__)


@pytest.fixture(params=["torch", "interpret", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test puts its tensors. On Triton, memory that torch.empty hands out is NaN (or the largest integer)."""
    if request.param == "torch":
        yield torch.device("cpu")
        return
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
