"""Two checkouts beside each other: each side imports its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import versions
from benchmarks.subjects import Worker

ROOT = Path(__file__).resolve().parents[1]


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main(["tiny", "--old", str(tmp_path), "--out", str(tmp_path)])
    assert "no benchmarks/worker.py" in capsys.readouterr().err


def test_each_side_runs_its_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy's engine calls itself by another name, which only its own code could report."""
    old = tmp_path / "old checkout"
    shutil.copytree(ROOT, old, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "tests", "docs"))
    report = old / "deploy" / "bench" / "report.py"
    text = report.read_text(encoding="utf-8")
    assert "def device_name(" in text
    report.write_text(text + "\n\ndef device_name(device: str) -> str:\n    return 'of the copy'\n", encoding="utf-8")
    group = versions.GROUPS["tiny"]
    monkeypatch.setitem(versions.GROUPS, "tiny", versions.replace(group, num_turns=1, num_decoded=4))
    devices: dict[str, str] = {}
    monkeypatch.setattr(versions, "wait_for_all", lambda workers, wait, log: _noted(workers, wait, devices))
    versions.main(["tiny", "--old", str(old), "--out", str(tmp_path), "--commit", "abc"])
    rows = json.loads((tmp_path / "versions_tiny.json").read_text(encoding="utf-8"))["rows"]
    assert [row["what"] for row in rows] == ["decode B=1 @32", "prefill B=1 @32", "decode B=8 @32", "prefill B=8 @32"]
    assert all(row["ratio"] > 0 for row in rows)
    assert devices["old"] == "of the copy"
    assert devices["new"] != "of the copy"


def _noted(
    workers: dict[str, Worker], wait: Callable[[Worker], dict[str, Any]], devices: dict[str, str]
) -> dict[str, Any]:
    ready = {name: wait(worker) for name, worker in workers.items()}
    devices.update({name: said["device"] for name, said in ready.items()})
    return ready
