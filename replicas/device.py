"""Device and CPU threads of a shard. Imports torch late: the CLI needs this without it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from .errors import ConfigError

DEVICES = ("auto", "cpu", "cuda")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def choose_device(device: str) -> str:
    """ "cpu" or "cuda" for EngineConfig.device. Raises ConfigError if there is no CUDA device."""
    if device not in DEVICES:
        raise ConfigError(f"device {device!r} is not supported; use one of {', '.join(DEVICES)}")
    if device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ConfigError("device is cuda, but torch finds no CUDA device; use device cpu or auto")
    return "cpu"


def this_machine() -> tuple[str, str]:
    """Host name and boot id ("" if unknown): hosts may share a name."""
    return socket.gethostname(), _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def automatic_threads(num_engines: int = 1) -> int:
    """Threads for each of `num_engines` CPU engines: a share of all cores but one, for router,
    proxy and Ray.

    OpenMP threads meet at the end of every operator, so one that loses its core stalls the
    rest. On 2 busy cores a decode step of the shipped model took 17 to 48 ms with two threads,
    4 ms with one.
    """
    return max(1, (usable_cores() - 1) // num_engines)


def set_cpu_threads(num_threads: int | None, num_neighbours: int = 1) -> int:
    """Set and return torch's intra-op threads; None: this process's share among
    `num_neighbours`.

    Ray sets OMP_NUM_THREADS=1 (or the actor's num_cpus), which torch would obey.
    """
    threads = automatic_threads(num_neighbours) if num_threads is None else num_threads
    if threads < 1:
        raise ConfigError(f"num_threads is {threads}; it must be at least 1")
    import torch

    torch.set_num_threads(threads)
    return threads
