"""Shared memory: used by Ray's object store, and by NCCL without peer access."""

from __future__ import annotations

import os
from pathlib import Path

from .finding import Finding, Status, gib

# Ray refuses a store below 75 MiB. A container has 64 MiB by default.
_LEAST = 128 << 20
_ENOUGH = 1 << 30
_LARGER = "docker run --shm-size=8g; on Kubernetes an emptyDir with medium Memory"


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Findings about the shared memory file system."""
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        message = f"{folder} cannot be used: {error.strerror}"
        return [Finding("shared memory", Status.WRONG, message, f"mount a tmpfs there: {_LARGER}")]
    return findings(str(folder), stat.f_frsize * stat.f_blocks, stat.f_frsize * stat.f_bavail)


def findings(folder: str, size: int, free: int) -> list[Finding]:
    """Findings from its size and free bytes."""
    figures = {"size_bytes": size, "free_bytes": free}
    message = f"{folder} has {gib(size)}, {gib(free)} of it free"
    if free >= _ENOUGH:
        return [Finding("shared memory", Status.OK, message, figures=figures)]
    status = Status.WRONG if free < _LEAST else Status.WARNING
    remedy = f"give it {gib(_ENOUGH)} or more: {_LARGER}"
    if size >= 2 * _ENOUGH:
        remedy = f"remove what processes that ended have left in {folder}"
    return [Finding("shared memory", status, message, remedy, figures)]
