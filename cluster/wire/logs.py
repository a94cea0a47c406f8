"""Log destinations of Serve actors, ranks and the directory. Outside Serve, the program configures logging.

Replicas and routers use Serve's logger and level (`logging_config`). Ranks and the directory write the
same format to standard error, which Ray collects.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.context import ReplicaContext

_SERVE = "ray.serve"
_OWN = __name__.partition(".")[0]


class _ToServe(logging.Handler):
    """Forwards records to Serve's logger, looked up per record: Serve replaces it when `logging_config` changes."""

    def emit(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(_SERVE)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


def log_to_serve() -> None:
    """Route Shoal's logs to Serve's logger; does nothing outside a Serve actor. Idempotent."""
    logger = logging.getLogger(_OWN)
    if _context() is None or any(isinstance(handler, _ToServe) for handler in logger.handlers):
        return
    logger.addHandler(_ToServe())
    logger.setLevel(logging.NOTSET + 1)  # Serve's level filters each record
    logger.propagate = False


@dataclass(frozen=True, slots=True)
class RankLog:
    """Names and level with which the ranks of a replica log."""

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
        """Configure this process's logging as `rank`."""
        log_to_stderr(f"{self.app}_{self.deployment} {self.replica} rank {rank}", self.level)


def log_to_stderr(name: str, level: int) -> None:
    """Log to standard error in Serve's format, unless the user has configured logging."""
    logger = logging.getLogger(_OWN)
    logger.setLevel(level)
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler(sys.stderr)
    escaped = name.replace("%", "%%")
    handler.setFormatter(logging.Formatter(f"%(levelname)s %(asctime)s {escaped} -- %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def _context() -> ReplicaContext | None:
    from ray import serve  # here: a rank needs it for nothing else
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context()
    except RayServeException:
        return None
