"""What /proc says of processes."""

from __future__ import annotations

import os
import time
from pathlib import Path


def children(pid: int | None = None) -> set[int]:
    """The processes that this process, or that one, has started and that have not ended."""
    tasks = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split() if not has_ended(int(child))}


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for_end(pids: set[int]) -> None:
    """Until all of them have ended; the test's own limit applies."""
    while not all(map(has_ended, pids)):
        time.sleep(0.01)


def wait_for_children(before: set[int], count: int, pid: int | None = None) -> list[int]:
    """Until there are `count` more than those of `before`; their ids, the oldest first."""
    while len(new := children(pid) - before) < count:
        time.sleep(0.01)
    return sorted(new)


def cpu_seconds(pid: int) -> float:
    """What the process has spent, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
