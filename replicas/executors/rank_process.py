"""Main of a rank's process, which `shard_processes.py` starts.

A socket pair carries calls of ShardRank's methods, answered in order. The process exits when the
socket closes, so it never outlives its parent.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

_EXIT_PARENT_GONE = 72


def main(descriptor: int) -> None:
    """Answer calls on the socket until `serve` returns."""
    # Ctrl-C reaches the whole foreground group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = Connection(descriptor)
    calls: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(control, calls), name="shoal-parent", daemon=True).start()
    from .shard_rank import ShardRank  # importing torch takes seconds; the thread above already watches the parent

    config, rank, local_rank, level = calls.get()[1]
    logging.basicConfig(format=f"%(levelname)s rank {rank}: %(message)s")
    logging.getLogger("shoal").setLevel(level)
    shard_rank = ShardRank(config, rank, local_rank)
    method = ""
    while method != "serve":
        method, arguments = calls.get()
        try:
            answer = getattr(shard_rank, method)(*arguments), None
        except Exception as error:
            answer = None, error
        _answer(control, answer)
    # A normal exit would destroy process groups and graphs, which may wait for lost ranks.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _receive(control: Connection, calls: SimpleQueue[tuple[str, tuple[Any, ...]]]) -> None:
    try:
        while True:
            calls.put(control.recv())
    except (EOFError, OSError):
        os._exit(_EXIT_PARENT_GONE)


def _answer(control: Connection, answer: tuple[Any, Exception | None]) -> None:
    value, error = answer
    try:
        control.send((value, _portable(error)))
    except OSError:
        os._exit(_EXIT_PARENT_GONE)


def _portable(error: Exception | None) -> Exception | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
