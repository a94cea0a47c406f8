"""Logs of a failed start: Ray's files, and the last lines of the process that crashed first.

A process killed by a signal or a library leaves its reason only on standard error, which Ray keeps in a
file.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

_WORKER = re.compile(r"worker-\w+-\w+-(\d+)\.err")
_ACTOR = re.compile(r"^:actor_name:(ShardActor|ServeReplica:\S+)$", re.MULTILINE)
# First line of Ray's and Python's report of a fatal signal; addresses and frames follow.
_CRASH = re.compile(r"^(?:\*\*\* SIG|Fatal Python error)", re.MULTILINE)
_OF_RAY = re.compile(r":\w+:|INFO |\[[\d: ,-]+ [A-Z] \d+ \d+\]")  # marks of the actor, and lines of Ray's own
_NAMED = re.compile(r"process (\d+)[^()]*\): its process has ended")  # as a group's error names a rank
_LINES = 5


@dataclass(frozen=True, slots=True)
class LastWords:
    """The last lines that a process wrote. ended: when the file was last written."""

    pid: int
    actor: str
    lines: tuple[str, ...]
    ended: float

    def __str__(self) -> str:
        what = "a rank" if self.actor == "ShardActor" else self.actor
        return "\n  ".join((f"process {self.pid}, {what}, wrote last:", *self.lines))


def explain(error: Exception, ray_folder: Path) -> None:
    """Add the process that ended first, and the logs' location, to the error of a failed start.

    ray_folder: of an ended Ray; its logs are moved out.
    """
    kept = keep_logs(ray_folder)
    if kept is None:
        return
    words = first_words(kept, str(error))
    if words is not None:
        error.add_note(str(words))
    error.add_note(f"the logs of all processes are kept in {kept}")


def keep_logs(ray_folder: Path) -> Path | None:
    """Move an ended Ray's logs out of its folder. Returns their new folder, None without logs."""
    logs = next(iter(sorted(ray_folder.glob("session_2*/logs"))), None)
    if logs is None:
        return None
    kept = ray_folder.with_name(f"{ray_folder.name}-logs")
    shutil.move(logs, kept)
    return kept


def first_words(logs: Path, error: str) -> LastWords | None:
    """Last lines of the process that ended first, among those crashed or named by the error."""
    named = set(map(int, _NAMED.findall(error)))
    found = [words for file in logs.glob("worker-*.err") if (words := _words(file, named)) is not None]
    return min(found, key=lambda words: words.ended, default=None)


def _words(file: Path, named: set[int]) -> LastWords | None:
    name, text = _WORKER.fullmatch(file.name), file.read_text(encoding="utf-8", errors="replace")
    actor, crash = _ACTOR.search(text), _CRASH.search(text)
    if name is None or actor is None or not (crash or int(name[1]) in named):
        return None
    said = text[: crash.start()] if crash else text
    lines = [line for line in said.splitlines() if line.strip() and not _OF_RAY.match(line)]
    if crash:
        lines.append(text[crash.start() :].partition("\n")[0])
    return LastWords(int(name[1]), actor[1], tuple(lines[-_LINES:]), file.stat().st_mtime) if lines else None
