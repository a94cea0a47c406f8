"""Programmatic dependent launch: a kernel starts while the one before it on the stream still drains.

A kernel launched with `pdl_launch` may begin before the kernel before it has ended. Everything that an earlier kernel
wrote, and everything that an earlier kernel may still read, is out of bounds until `wait_for_inputs`; weights and other
constants may be loaded before it. `release_dependents` lets the next kernel start in the
same way. Call it once this program's loads are issued: the next kernel starts when all programs
have called it or ended. It hides launch and drain, 1 to 2 us a kernel on an H200.

A kernel that waits must be launched after kernels that wait (or ordinary ones): waiting is what makes it follow, not
only its neighbour, but all before that one. Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch".
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
    """Launch `kernel` on `grid`: tensors and numbers by position, constexpr parameters and Triton's options by name.

    Type checkers see a kernel's own parameters in `kernel[grid]`, without the options that Triton adds to them.
    """
    kernel[grid](*operands, **constants)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Returns once the kernels before this one have ended and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """The next kernel may start as far as this program is concerned."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # pyright: ignore[reportAttributeAccessIssue]


def pdl_launch(tensor: torch.Tensor) -> dict[str, Any]:
    """Launch arguments of a kernel that takes PDL and works on `tensor`: dependent launch from Hopper on."""
    if backend_of(tensor) is not Backend.TRITON or torch.cuda.get_device_capability(tensor.device) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}
