"""The process that keeps a server: it takes the signals, and ends when all of the server has ended.

`kill %1`, `timeout`, a terminal that closes and many a CI send their signal to a whole process group. Ray's own
processes would have it too and end before the server has drained its streams, which it then cannot. So the server leads
a group of its own, and the keeper, which stays in its caller's, passes the signal on. What the server leaves when it
ends by force becomes the keeper's: it ends those processes and removes what they wrote.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from ..environment import make_ray_folder
from .start_logs import keep_logs

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <linux/prctl.h>


def under_supervisor() -> Path:
    """Goes on in a child, the server, with a folder for its Ray; this process ends when that has, with its status.

    In the child KeyboardInterrupt is raised, once, at any signal that asks it to stop, and when the keeper is killed.
    """
    signals = _stop_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until both have handlers
    folder = make_ray_folder()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper, others = os.getpid(), set(_children())  # of a script's that has `exec`ed this program
    server = os.fork()
    if server != 0:
        sys.exit(_keep(server, others, folder))
    os.setpgid(0, 0)
    interrupt_on_signals()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != keeper:  # it has ended in the meantime
        os.kill(os.getpid(), signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return folder


def interrupt_on_signals() -> None:
    """Whatever asks a server to stop unwinds what was started, at any time; once, for the unwinding takes a while."""
    signals = _stop_signals()

    def interrupt(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        say("shoal: stopping")
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)


def say(line: str) -> None:
    """A line on the standard output, if there is somebody left to read it."""
    try:
        print(line, flush=True)
    except OSError:  # the same Ctrl-C has ended a `| tee`, or the terminal is closed; what comes is not worth an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop_signals() -> list[signal.Signals]:
    """The end of its terminal is not among them where a server was started to outlive that (nohup)."""
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if outlives else [signal.SIGHUP])]


def _keep(server: int, others: set[int], folder: Path) -> int:
    """Passes signals on until the server has ended; then ends and removes what is left of it. Returns a status."""
    signals, asked = _stop_signals(), False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        os.kill(server, signal.SIGINT)  # not SIGTERM: Ray puts a handler of its own in the place of ours as it starts

    for number in signals:
        signal.signal(number, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    _wait_for(server)
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    code = _end_children(server, others)
    if code < 0:
        print(f"shoal: error: the server was ended by {signal.Signals(-code).name}", file=sys.stderr)
    if code != 0 and not asked and (logs := keep_logs(folder)) is not None:
        print(f"shoal: the logs of all processes are kept in {logs}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


def _wait_for(server: int) -> None:
    """Returns when the server has ended, and leaves it a zombie, so that no other process can have its id yet."""
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)) is not None and ended.si_pid != server:
        os.waitpid(ended.si_pid, 0)


def _end_children(server: int, others: set[int]) -> int:
    """Ends every process that the server has left. Returns the server's own exit code, negative for a signal."""
    code = 0
    while left := set(_children()) - others:
        for child in left:
            os.kill(child, signal.SIGKILL)  # does nothing to one that has ended and waits for us to see it
        for child in left:  # what it leaves in turn is a child of this process when the wait is over
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            code = status if child == server else code
    return code


def _children() -> Iterator[int]:
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = file.read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:  # it has just ended, and is none of this process's children, which stay until it waits for them
            continue
        if int(parent) == os.getpid():
            yield int(file.parent.name)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
