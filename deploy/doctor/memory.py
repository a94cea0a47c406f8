"""Shared memory: Ray's object store lives in it, and NCCL's buffers where GPUs do not reach each other."""

from __future__ import annotations

import os
from pathlib import Path

from .finding import Finding, Status, gib

# Ray refuses a store below 75 MiB. A container has 64 MiB unless it is told otherwise, which is what this is to find.
_LEAST = 128 << 20
_ENOUGH = 1 << 30


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Findings about the file system that shared memory is taken from."""
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        remedy = "mount a tmpfs there: docker run --shm-size=8g; on Kubernetes an emptyDir with medium Memory"
        return [Finding("shared memory", Status.WRONG, f"{folder} cannot be used: {error.strerror}", remedy)]
    return findings(str(folder), stat.f_frsize * stat.f_blocks, stat.f_frsize * stat.f_bavail)


def findings(folder: str, size: int, free: int) -> list[Finding]:
    """What a size and what is free of it, in bytes, mean."""
    figures = {"size_bytes": size, "free_bytes": free}
    message = f"{folder} has {gib(size)}, of which {gib(free)} are free"
    remedy = (
        ""
        if free >= _ENOUGH
        else (
            f"give it {gib(_ENOUGH)} or more: docker run --shm-size=8g; on Kubernetes an emptyDir with medium Memory"
            if size < 2 * _ENOUGH
            else f"remove what processes that ended have left in {folder}"
        )
    )
    status = Status.WRONG if free < _LEAST else Status.WARNING if free < _ENOUGH else Status.OK
    return [Finding("shared memory", status, message, remedy, figures)]
