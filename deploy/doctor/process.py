"""Probes: child processes that answer in JSON lines, with a time limit."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_S = 0.02
_LAST_WORDS = 400  # characters of a failed probe's output


@dataclass(frozen=True, slots=True)
class Outcome:
    """A probe's answer. `status` is None if it ran out of time and was killed."""

    lines: tuple[dict[str, Any], ...]
    status: int | None
    last_words: str
    limit_s: float

    @property
    def failure(self) -> str | None:
        """Why the answer is incomplete; None if it is complete."""
        if self.status == 0:
            return None
        if self.status is None:
            how = f"it had no answer within {self.limit_s:g} s"
        elif self.status < 0:
            how = f"it was killed by signal {-self.status}"
        else:
            how = f"it ended with status {self.status}"
        return f"{how}: {self.last_words}" if self.last_words else how


def run_probe(module: str, *arguments: str, limit_s: float, env: Mapping[str, str] | None = None) -> Outcome:
    """Run one probe of this package."""
    [outcome] = run_probes(module, [arguments], limit_s=limit_s, env=env)
    return outcome


def run_probes(
    module: str, arguments: Sequence[Sequence[str]], *, limit_s: float, env: Mapping[str, str] | None = None
) -> list[Outcome]:
    """Run a probe for each list of arguments, in parallel. If one fails, the others are ended."""
    # Modules are found as in this process, but never in the working directory.
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, **(env or {})}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shoal-doctor-") as folder:
        outputs = [Path(folder) / f"{rank}" for rank in range(len(arguments))]
        running = [
            _start(module, [str(limit_s), *one], output, environment)
            for one, output in zip(arguments, outputs, strict=True)
        ]
        try:
            statuses = _wait(running, begin + limit_s)
        finally:
            for process in running:
                with suppress(OSError):
                    process.kill()
                process.communicate()
        return [
            Outcome(tuple(_lines(output)), status, _last_words(output), limit_s)
            for output, status in zip(outputs, statuses, strict=True)
        ]


def _start(module: str, arguments: Sequence[str], output: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", f"{__package__}.{module}", *arguments]
    with output.with_suffix(".out").open("wb") as out, output.with_suffix(".err").open("wb") as err:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env)


def _wait(running: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int | None]:
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in running]
        if None not in statuses or any(statuses):
            return statuses
        time.sleep(_POLL_S)
    return [process.poll() for process in running]


def _lines(output: Path) -> list[dict[str, Any]]:
    """A probe's JSON lines, without what libraries print or a line cut short."""
    found = []
    for line in output.with_suffix(".out").read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found


def _last_words(output: Path) -> str:
    """The last line of a traceback or output."""
    said = output.with_suffix(".err").read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1][:_LAST_WORDS] if lines else ""


def begin() -> tuple[float, list[str]]:
    """In a probe: read time limit and arguments. The probe ends after that time, or with its owner."""
    limit_s = float(sys.argv[1])
    signal.alarm(math.ceil(limit_s) + 1)  # the signal's own action: no Python has to run for it
    threading.Thread(target=_end_with_owner, daemon=True).start()
    return limit_s, sys.argv[2:]


def _end_with_owner() -> None:
    """End when standard input ends, which it does with the doctor."""
    with suppress(OSError):
        os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def say(**values: Any) -> None:
    """In a probe: print one line of the answer."""
    print(json.dumps(values), flush=True)
