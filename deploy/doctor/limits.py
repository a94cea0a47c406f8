"""The limit of open files: every token stream is a socket."""

from __future__ import annotations

import resource

from .finding import Finding, Status

# Python, Ray's connections and the model's files take some hundreds.
_LEAST = 1024
_ENOUGH = 8192


def check_open_files() -> list[Finding]:
    """Findings about this process's limit, which child processes inherit."""
    return findings(*resource.getrlimit(resource.RLIMIT_NOFILE))


def findings(soft: int, hard: int) -> list[Finding]:
    """Findings from the soft limit and the hard limit."""
    if soft == resource.RLIM_INFINITY:
        return [Finding("open files", Status.OK, "a process may open any number of files")]
    status = Status.WRONG if soft < _LEAST else Status.WARNING if soft < _ENOUGH else Status.OK
    remedy = ""
    if status is not Status.OK:
        raised = f"ulimit -n {_ENOUGH} in the shell that starts Ray"
        unlimited = hard == resource.RLIM_INFINITY or hard >= _ENOUGH
        remedy = raised if unlimited else f"{raised}, once the hard limit, {hard}, is raised (limits.conf, LimitNOFILE)"
    message = f"a process may open {soft} files, and a router that serves n streams opens somewhat more than n"
    return [Finding("open files", status, message, remedy, {"soft": soft, "hard": hard})]
