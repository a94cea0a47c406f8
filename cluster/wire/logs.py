"""Where the log lines of a Serve actor and of its ranks go. Without Serve, whoever runs the program says it.

A replica and a router hand theirs to Serve's logger, which has files, a format with the replica's name, and a level
that users set (`logging_config`). A rank is no actor of Serve's: it writes to its standard error, which Ray keeps and
shows as it does Serve's, in the same form, with the replica's name and its own number. So does the directory.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.context import ReplicaContext

_SERVE = "ray.serve"
_OWN = __name__.partition(".")[0]  # the parent of all of Shoal's loggers


class _ToServe(logging.Handler):
    """Hands records to Serve's logger as that is by then: Serve sets it up anew when its `logging_config` changes."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(_SERVE)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def log_to_serve() -> None:
    """In an actor of Serve's: Shoal's lines go where Serve's go. Elsewhere nothing changes. Idempotent."""
    logger = logging.getLogger(_OWN)
    if _context() is None or any(isinstance(handler, _ToServe) for handler in logger.handlers):
        return
    logger.addHandler(_ToServe())
    logger.setLevel(logging.NOTSET + 1)  # Serve's level decides, at every line
    logger.propagate = False  # as Serve's own: a handler of the root would write the line once more


@dataclass(frozen=True, slots=True)
class RankLog:
    """How the ranks of a replica log: under its names, and from its level of Python's `logging` on."""

    app: str
    deployment: str
    replica: str
    level: int

    @staticmethod
    def of_this_replica() -> RankLog | None:
        """None outside Serve."""
        context = _context()
        if context is None:
            return None
        level = logging.getLogger(_SERVE).getEffectiveLevel()
        return RankLog(context.app_name, context.deployment, context.replica_id.unique_id, level)

    def start(self, rank: int) -> None:
        """Log so from now on, as that rank."""
        log_to_stderr(f"{self.app}_{self.deployment} {self.replica} rank {rank}", self.level)


def log_to_stderr(name: str, level: int) -> None:
    """In a process of Ray's that is no actor of Serve's: Shoal's lines go to its standard error, in Serve's form.

    They are left to Ray's own logging where a user has set that up.
    """
    logger = logging.getLogger(_OWN)
    logger.setLevel(level)
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    escaped = name.replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s {escaped} -- %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False  # to a handler that some library gives the root later


def _context() -> ReplicaContext | None:
    from ray import serve  # here: a rank's process has no other use for it
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context()
    except RayServeException:
        return None
