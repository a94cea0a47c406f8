"""The comparison by turns: its rows, and whole runs in which a second Shoal stands in for vLLM."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import parallel, vs_vllm
from benchmarks.alternate import OURS, PEER, Decode, Figure, Offline, alternate
from benchmarks.subjects import Python, started_server, started_worker
from shoal.deploy.bench.http_client import Target
from shoal.deploy.bench.limits import Dense, Rates
from shoal.deploy.bench.serving import Shape
from shoal.deploy.bench.workload import Workload
from shoal.replicas.errors import ServingError

FAR = 1e12  # a deadline


class Engine:
    """Says that a workload took so long a token, and keeps what it was given."""

    def __init__(self, seconds_per_token: float) -> None:
        self.seconds_per_token = seconds_per_token
        self.workloads: list[Workload] = []

    def __call__(self, workload: Workload) -> float:
        self.workloads.append(workload)
        return workload.num_output_tokens * self.seconds_per_token


def test_a_ratio_above_one_says_that_ours_is_better() -> None:
    goals = {"a": (1.1, 1.5)}
    faster = Figure("a", "ms", (2.0, 3.0), lower_is_better=True, limit=1.0).row(goals)
    assert (faster["ratio"], faster["floor"], faster["aim"], faster["met"]) == (1.5, 1.1, 1.5, True)
    assert faster["of limit"] == 0.5
    slower = Figure("a", "tok/s", (2.0, 4.0), lower_is_better=False, limit=8.0).row(goals)
    assert (slower["ratio"], slower["met"], slower["of limit"]) == (0.5, False, 0.25)
    alone = Figure("b", "ms", (2.0, None), lower_is_better=True).row(goals)
    assert (alone["ratio"], alone["floor"], alone["met"]) == (None, None, None)


def test_both_get_the_same_work_by_turns() -> None:
    order: list[str] = []

    class Watched(Engine):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__(seconds)
            self.name = name

        def __call__(self, workload: Workload) -> float:
            order.append(self.name)
            return super().__call__(workload)

    ours, peer = Watched(OURS, 0.001), Watched(PEER, 0.002)
    rows = [Decode(2, 5, 50, num_decoded=4), Offline(Workload([[1], [2]], [3, 4]))]
    kept: list[int] = []
    alternate(rows, {OURS: ours, PEER: peer}, FAR, lambda: kept.append(1), say=lambda _: None)
    assert ours.workloads == peer.workloads
    assert order == 2 * ([OURS] * 2 + [PEER] * 2 + [OURS, PEER])
    assert len(kept) == 8
    decode, prefill = rows[0].figures()
    assert decode.values == pytest.approx([2.0, 4.0])  # two sequences a step, in ms
    assert prefill.values == pytest.approx([5000, 2500])
    (offline,) = rows[1].figures()
    assert offline.values == pytest.approx([1000, 500])


def test_a_second_turn_that_does_not_fit_is_left_out() -> None:
    said: list[str] = []
    ours = Engine(0.001)
    alternate([Offline(Workload([[1]], [2]))], {OURS: ours}, time.monotonic() - 1, lambda: None, say=said.append)
    assert len(ours.workloads) == 1
    assert any("left out" in line for line in said)


def test_one_that_fails_does_not_take_the_other_along() -> None:
    def broken(workload: Workload) -> float:
        raise RuntimeError("out of memory")

    said: list[str] = []
    row = Decode(1, 4, 50, num_decoded=2, model=Dense(10, 10, 2, 2, 4), rates=Rates(1e3, 1e3))
    alternate([row], {OURS: Engine(0.001), PEER: broken}, FAR, lambda: None, num_turns=1, say=said.append)
    decode, _ = row.figures()
    assert decode.values == [pytest.approx(1.0), None]
    assert decode.limit is not None
    assert any("vllm failed at row 1: out of memory" in line for line in said)


def test_engines_in_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vs_vllm.main(["tiny", "--peer-engine", "shoal", "--out", str(tmp_path), "--commit", "abc"])
    report = json.loads((tmp_path / "vs_vllm_tiny.json").read_text())
    assert report["commit"] == "abc"
    assert report["settings"]["shoal is"] == report["settings"]["vllm is"] == "Shoal"
    assert report["settings"]["shoal ready s"] > 0
    whats = [f"{kind} B={batch} @32" for batch in (1, 2) for kind in ("decode", "prefill")]
    assert [row["what"] for row in report["rows"]] == [*whats, "offline throughput"]
    for row in report["rows"]:
        assert row["ratio"] == pytest.approx(
            row["vllm"] / row["shoal"] if row["unit"] == "ms" else row["shoal"] / row["vllm"]
        )
    assert report["rows"][0]["floor"] == 0.1
    assert "offline throughput" in capsys.readouterr().out


def test_a_machine_with_too_few_gpus_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.subjects.visible_gpus", lambda: 2)
    with pytest.raises(SystemExit):
        vs_vllm.main(["70b-tp4", "--out", str(tmp_path)])
    assert "70b needs 4 GPUs, and there are 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_engines_of_two_ranks_in_workers(tmp_path: Path) -> None:
    vs_vllm.main(["tiny-tp2", "--peer-engine", "shoal", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "vs_vllm_tiny_tp2.json").read_text())
    assert report["settings"]["tp"] == 2
    assert report["device"].startswith("2 x ")
    assert [row["what"] for row in report["rows"]] == ["decode B=2 @32", "prefill B=2 @32", "offline throughput"]
    assert all(row["shoal"] > 0 and row["vllm"] > 0 for row in report["rows"])


@pytest.mark.slow
def test_splits_beside_one_rank(tmp_path: Path) -> None:
    parallel.main(["tiny", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "parallel_tiny.json").read_text())
    whats = ["decode B=2 @32", "prefill B=2 @32", "offline throughput"]
    assert [(row["split"], row["what"]) for row in report["rows"]] == [
        (split, what) for split in ("tp 2", "pp 2") for what in whats
    ]
    decode, _, offline = report["rows"][3:]
    assert decode["ratio"] == pytest.approx(decode["one GPU"] / decode["split's"])
    assert offline["ratio"] == pytest.approx(offline["split's"] / offline["one GPU"])
    assert offline["floor"] == 0.1


def test_a_worker_says_what_went_wrong(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        started_worker("shoal", {"model": "/nowhere"}, log, Python()) as worker,
        pytest.raises(RuntimeError, match="/nowhere"),
    ):
        worker.wait()
    assert "/nowhere" in log.read_text()


def test_a_server_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    target = Target("127.0.0.1", 1, "m")
    arguments = ["-c", "print('no device')"]
    with (
        started_server(Python(sys.executable), arguments, target, tmp_path / "log") as server,
        pytest.raises(ServingError),
    ):
        server.wait(Shape())
    assert (tmp_path / "log").read_text() == "no device\n"


@pytest.mark.slow
def test_servers(tmp_path: Path) -> None:
    vs_vllm.main(["tiny-http", "--peer-engine", "shoal", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "vs_vllm_tiny_http.json").read_text())
    whats = {row["what"]: row for row in report["rows"]}
    assert {"c=1 output tok/s", "c=1 TTFT p50", "c=4 TPOT p50", "c=4 ITL p99"} <= set(whats)
    assert all(row["shoal"] > 0 and row["vllm"] > 0 for row in report["rows"])
