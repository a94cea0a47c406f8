"""A process that is a rank: what `shard_processes.py` starts, and its end of the talk with it.

Calls come over a socket that only the two processes have: pairs of a ShardRank's method and its arguments, one answered
before the next. When the parent is gone, however it went, so is this process: the socket tells.
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
    """Answers calls on that socket until `serve` has returned."""
    # Of the whole foreground group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = Connection(descriptor)
    calls: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
    threading.Thread(target=_receive, args=(control, calls), name="shoal-parent", daemon=True).start()
    from .shard_rank import ShardRank  # loads torch, which takes seconds: the parent is watched meanwhile

    config, rank, local_rank, level = calls.get()[1]
    logging.basicConfig(format=f"%(levelname)s rank {rank}: %(message)s")
    logging.getLogger(__package__).setLevel(level)
    shard_rank = ShardRank(config, rank, local_rank)
    method = ""
    while method != "serve":
        method, arguments = calls.get()
        try:
            answer = getattr(shard_rank, method)(*arguments), None
        except Exception as error:
            answer = None, error
        _answer(control, answer)
    # Not by way of the interpreter's end, which destroys process groups and graphs: that may wait for who is gone.
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
    """The error, or its words where the parent could not read it: some can be written and not read."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
