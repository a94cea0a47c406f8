"""Log destinations: Serve's logger under Serve, standard error in ranks, none offline."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from shoal.cluster.wire import logs
from shoal.cluster.wire.logs import RankLog, log_to_serve

OWN, SERVE = logging.getLogger("shoal"), logging.getLogger("ray.serve")


class Lines(logging.Handler):
    """Keeps its records."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture(autouse=True)
def loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loggers as in a new process; restores them at the end."""
    for logger in (OWN, SERVE):
        monkeypatch.setattr(logger, "handlers", [])
    before = [(logger, logger.level, logger.propagate) for logger in (OWN, SERVE)]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def in_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = SimpleNamespace(app_name="shoal", deployment="Replica-a%b", replica_id=SimpleNamespace(unique_id="x1"))
    monkeypatch.setattr(logs, "_context", lambda: replica)
    SERVE.propagate = False


def serve_has(level: int) -> Lines:
    """Reconfigure Serve's logger, as a change of `logging_config` does."""
    lines = Lines()
    SERVE.handlers[:] = [lines]
    SERVE.setLevel(level)
    return lines


@pytest.mark.usefixtures("in_serve")
def test_lines_go_where_serves_go_once_and_at_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, root = logging.getLogger("shoal.replicas.worker.shard"), Lines()
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    lines = serve_has(logging.INFO)
    log_to_serve()
    log_to_serve()
    logger.info("ready")
    logger.debug("detail")
    assert lines.said == ["ready"]
    later = serve_has(logging.DEBUG)
    logger.debug("detail")
    serve_has(logging.WARNING)
    logger.info("ready")
    assert (lines.said, later.said, root.said) == (["ready"], ["detail"], [])


def test_outside_serve_nothing_is_set_up() -> None:
    before = OWN.level, OWN.propagate
    log_to_serve()
    assert RankLog.of_this_replica() is None
    assert (OWN.level, OWN.propagate, OWN.handlers) == (*before, [])


@pytest.mark.usefixtures("in_serve")
def test_a_rank_names_its_replica_and_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    serve_has(logging.INFO)
    log = RankLog.of_this_replica()
    assert log is not None
    log.start(3)
    logging.getLogger().addHandler(logging.StreamHandler())
    logging.getLogger("shoal.replicas.worker.shard").info("ready in %d s", 2)
    logging.getLogger("shoal.replicas.worker.shard").debug("detail")
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"INFO [-\d]+ [:,\d]+ shoal_Replica-a%b x1 rank 3 -- ready in 2 s", line)


def test_a_rank_leaves_its_lines_to_a_logging_that_is_set_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the `logging_config` of `ray.init`, which gives every process of a job a handler."""
    root = Lines()
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    RankLog("shoal", "Replica-tiny", "x1", logging.INFO).start(0)
    logging.getLogger("shoal.replicas.worker.shard").info("ready")
    assert (root.said, capsys.readouterr().err) == (["ready"], "")
