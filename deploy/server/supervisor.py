"""The supervisor of a server: it forwards signals, and exits after the server's last process.

`kill %1`, `timeout` and a closed terminal signal a whole process group: Ray would exit before the server
has drained its streams. So the server leads its own group, and the supervisor stays in its caller's. As
subreaper it kills what a killed server leaves, and removes its files.
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
    """Fork, and return in the child, the server, the folder for its Ray. The parent exits with the child's status.

    There a stop signal, or the supervisor's end, raises KeyboardInterrupt once.
    """
    signals = _stop_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until both have handlers
    folder = make_ray_folder()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    supervisor = os.getpid()
    others = set(_children())  # a script that `exec`ed this program may have started some
    server = os.fork()
    if server != 0:
        sys.exit(_supervise(server, others, folder))
    os.setpgid(0, 0)
    interrupt_on_signals()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() != supervisor:  # it exited before prctl
        os.kill(os.getpid(), signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return folder


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt at the first stop signal; ignore later ones."""
    signals = _stop_signals()

    def interrupt(*_: object) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        say("shoal: stopping")
        raise KeyboardInterrupt

    for number in signals:
        signal.signal(number, interrupt)


def say(line: str) -> None:
    """Print, unless the reader of standard output has exited."""
    try:
        print(line, flush=True)
    except OSError:  # Ctrl-C ended a `| tee` too, or the terminal is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop_signals() -> list[signal.Signals]:
    """SIGHUP is not among them under nohup."""
    outlives = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if outlives else [signal.SIGHUP])]


def _supervise(server: int, others: set[int], folder: Path) -> int:
    """Forward signals until the server exits, then clean up. Returns an exit status."""
    signals, asked = _stop_signals(), False

    def stop(*_: object) -> None:
        nonlocal asked
        asked = True
        os.kill(server, signal.SIGINT)  # not SIGTERM: Ray replaces that handler as it starts

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
    """Leave the exited server a zombie, so that no other process gets its id yet."""
    while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)) is not None and ended.si_pid != server:
        os.waitpid(ended.si_pid, 0)


def _end_children(server: int, others: set[int]) -> int:
    """Kill all that the server left. Returns its exit code, negative for a signal."""
    code = 0
    while left := set(_children()) - others:
        for child in left:
            os.kill(child, signal.SIGKILL)  # no effect on a zombie
        for child in left:  # its own children are this process's once it is reaped
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            code = status if child == server else code
    return code


def _children() -> Iterator[int]:
    """Zombies included."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = file.read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:  # exited, and no child of this process: those stay zombies until reaped
            continue
        if int(parent) == os.getpid():
            yield int(file.parent.name)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")
