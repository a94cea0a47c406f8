"""Selects torch, Triton or Triton's interpreter for an operator.

`backend_of(tensor)` is Triton for a CUDA tensor, else torch. `with use_backend(...)` overrides it for its
body and thread.

`<operator>_triton.py` is imported only where it runs: a CPU process never loads Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum

import torch


class Backend(Enum):
    TORCH = "torch"
    TRITON = "triton"
    INTERPRET = "interpret"  # Triton kernels as Python on CPU tensors, 100 to 1000 times slower than torch


_FORCED: ContextVar[Backend | None] = ContextVar("shoal_kernel_backend", default=None)


def backend_of(tensor: torch.Tensor) -> Backend:
    """The backend of an operator whose data is `tensor`."""
    forced = _FORCED.get()
    if forced is not None:
        return forced
    return Backend.TRITON if tensor.is_cuda else Backend.TORCH


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run operators inside on `backend`, whatever their tensors' device.

    Raises RuntimeError for INTERPRET if Triton was imported without TRITON_INTERPRET=1.
    """
    if backend is Backend.INTERPRET:
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError("Triton does not interpret here; set TRITON_INTERPRET=1 before the process starts")
    token = _FORCED.set(backend)
    try:
        yield
    finally:
        _FORCED.reset(token)
