"""Programmatic dependent launch: a kernel starts while the one before it on the stream still drains.

A kernel launched with `pdl_launch` may begin before its predecessor has ended. Until `wait_for_inputs` it
must not touch what an earlier kernel writes, nor write what one may read. Call `release_dependents` once a
program's loads are issued: the next kernel starts when all programs have called it or ended. This hides
launch and drain, 1 to 2 us a kernel on an H200.

Every kernel of a chain must wait: only that orders it after all earlier ones. Source: CUDA C++ Programming
Guide, "Programmatic Dependent Launch".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
import triton.language as tl

from .backend import Backend, backend_of


class _Kernel(Protocol):
    def __getitem__(self, grid: Any, /) -> Callable[..., Any]: ...


def launch_kernel(kernel: _Kernel, grid: tuple[Any, ...], operands: tuple[Any, ...], /, **constants: Any) -> None:
    """Launch on `grid`: operands by position, constexprs and options, which type checkers reject, by name."""
    kernel[grid](*operands, **constants)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Return once all earlier kernels have ended and their writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """Allow the next kernel to start."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


def pdl_launch(tensor: torch.Tensor) -> dict[str, Any]:
    """Dependent launch from Hopper on."""
    if backend_of(tensor) is not Backend.TRITON or torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
