"""The two rates behind every limit: bytes a second of a large copy, flops a second of a large GEMM."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from .limits import Rates

_ROUNDS = 7
_REPEATS = 4  # a round, so that synchronization is amortized


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """Measure both on `device` with random data: zeros multiply 13 % faster on an H200."""
    return Rates(_copy_rate(device), _matmul_rate(device, dtype))


def _copy_rate(device: str) -> float:
    num_bytes = 1 << (27 if device == "cpu" else 31)  # far beyond any cache
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(device, lambda: target.copy_(source))


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    size = 512 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(device, lambda: torch.mm(a, b, out=out))


def _seconds(device: str, run: Callable[[], object]) -> float:
    """Median seconds of one `run`, synchronized."""
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[2:]) / _REPEATS
