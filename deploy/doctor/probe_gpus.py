"""Probe: what torch sees of the GPUs, and the copy rate of each ordered pair.

Output: one line about driver and torch, one for each GPU, one for each ordered pair.
"""

from __future__ import annotations

import ctypes
from itertools import permutations

import torch
from torch.cuda import nccl

from .process import begin, say

_COPIED = 256 << 20  # bytes
_COPIES = 5


def main() -> None:
    begin()
    say(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        driver_cuda=_driver_cuda(),
        available=torch.cuda.is_available(),
        nccl=".".join(map(str, nccl.version())) if torch.cuda.is_available() else None,
    )
    if not torch.cuda.is_available():
        return
    devices = range(torch.cuda.device_count())
    for device in devices:
        facts = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        capability = f"{facts.major}.{facts.minor}"
        say(
            device=device,
            name=facts.name,
            uuid=str(facts.uuid),
            capability=capability,
            total_bytes=total,
            free_bytes=free,
        )
    for source, target in permutations(devices, 2):
        access = torch.cuda.can_device_access_peer(source, target)
        say(source=source, target=target, access=access, bytes_per_s=_copy_rate(source, target))


def _driver_cuda() -> int | None:
    """The newest CUDA that the driver supports, as 1000 * major + 10 * minor; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _copy_rate(source: int, target: int) -> float:
    sent = torch.empty(_COPIED, dtype=torch.uint8, device=f"cuda:{source}")
    got = torch.empty(_COPIED, dtype=torch.uint8, device=f"cuda:{target}")
    with torch.cuda.device(source):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        got.copy_(sent)
        begin.record()
        for _ in range(_COPIES):
            got.copy_(sent)
        end.record()
        end.synchronize()
    return _COPIES * _COPIED / (begin.elapsed_time(end) * 1e-3)


if __name__ == "__main__":
    main()
