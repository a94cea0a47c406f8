"""`shoal bench`: every command runs on the shipped model at small sizes, and what it writes can be read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.deploy.cli import app
from tests.deploy.conftest import Api

SMALL = ["--set", "kv_cache_memory_bytes=33554432", "--set", "max_model_len=256", "--set", "max_num_seqs=8"]


def bench(*arguments: str | Path) -> None:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def read(path: Path) -> dict[str, Any]:
    report = json.loads(path.read_text())
    assert report["benchmark"] == path.stem
    assert report["device"]
    assert report["commit"] == "abc"
    return report


def test_latency(tmp_path: Path) -> None:
    path, trace = tmp_path / "latency_tiny.json", tmp_path / "trace.json"
    sizes = ["--batches", "1,2", "--contexts", "16,24", "--decoded", "3", "--rounds", "1"]
    bench("latency", "--model", "tiny", *sizes, *SMALL, "--trace", trace, "--json", path, "--commit", "abc")
    report = read(path)
    assert [(row["batch"], row["context"]) for row in report["rows"]] == [(1, 16), (2, 16), (1, 24), (2, 24)]
    for row in report["rows"]:
        assert row["decode ms"] == pytest.approx(1e3 * row["batch"] / row["tok/s"])
        assert row["of limit"] == pytest.approx(row["limit ms"] / row["decode ms"])
        assert row["prefill tok/s"] > 0
    assert report["settings"]["max_num_seqs"] == 8
    figures = report["trace"]
    assert figures["host us"] == pytest.approx(1e3 * figures["step ms"], rel=0.05), "a CPU's host computes the step"
    assert sum(value for name, value in figures.items() if name.endswith(" %")) == pytest.approx(100)
    assert figures["GEMM %"] > 0
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_model_that_is_split(tp: int, pp: int, tmp_path: Path) -> None:
    split = ["--set", f"tensor_parallel_size={tp}", "--set", f"pipeline_parallel_size={pp}", "--set", "num_threads=1"]
    latency, throughput = tmp_path / "latency_split.json", tmp_path / "throughput_split.json"
    sizes = ["--batches", "2", "--contexts", "16", "--decoded", "3", "--rounds", "1"]
    bench("latency", "--model", "tiny", *sizes, *SMALL, *split, "--json", latency, "--commit", "abc")
    (row,) = read(latency)["rows"]
    assert row["decode ms"] > 0
    sizes = ["--requests", "4", "--shortest", "2", "--longest", "9"]
    bench("throughput", "--model", "tiny", *sizes, *SMALL, *split, "--json", throughput, "--commit", "abc")
    report = read(throughput)
    assert report["rows"][0]["requests"] == 4
    settings = report["settings"]
    assert (settings["tensor_parallel_size"], settings["pipeline_parallel_size"]) == (tp, pp)


def test_throughput(tmp_path: Path) -> None:
    path = tmp_path / "throughput_tiny.json"
    sizes = ["--requests", "10", "--shortest", "2", "--longest", "9"]
    bench("throughput", "--model", "tiny", *sizes, *SMALL, "--json", path, "--commit", "abc")
    (row,) = read(path)["rows"]
    assert row["requests"] == 10
    assert row["preemptions"] == 0
    assert row["steps"] >= 9
    assert row["total tok/s"] > row["output tok/s"] > 0


def test_a_trace_of_a_workload_that_is_too_short_is_refused(tmp_path: Path) -> None:
    sizes = ["--requests", "2", "--shortest", "2", "--longest", "4", "--trace", str(tmp_path / "trace.json")]
    path = tmp_path / "throughput.json"
    result = CliRunner().invoke(app, ["bench", "throughput", "--model", "tiny", *sizes, *SMALL, "--json", str(path)])
    assert "give longer requests" in str(result.exception)
    assert json.loads(path.read_text())["rows"], "what was measured before is kept"


def test_kernels(tmp_path: Path) -> None:
    path = tmp_path / "kernels_tiny.json"
    options = ["--tokens", "1,3", "--contexts", "24", "--device", "cpu"]
    bench("kernels", "--model", "tiny", *options, "--json", path, "--commit", "abc")
    report = read(path)
    assert {re.split("[ ,]", row["kernel"])[0] for row in report["rows"]} == {
        *("rms_norm", "add_rms_norm", "silu_mul", "rope_kv_store", "linear", "gated_linear"),
        *("paged_decode", "paged_prefill", "embed", "sample", "apply_penalties", "score"),
        *("block_copy", "moe_mlp"),
    }
    assert [row["note"] for row in report["rows"] if "note" in row] == []
    assert all(row["us"] > 0 and row["of limit"] > 0 for row in report["rows"])
    assert any(row.get("cuBLAS us") for row in report["rows"])
    assert any(row.get("SDPA us") for row in report["rows"])


def test_kernels_by_name(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    options = ["--tokens", "2", "--contexts", "16", "--device", "cpu", "--only", "silu|^rms"]
    bench("kernels", "--model", "tiny", *options, "--json", path, "--commit", "abc")
    assert [row["kernel"] for row in read(path)["rows"]] == ["rms_norm", "silu_mul"]


@pytest.mark.parametrize("load", [["--concurrency", "1,3"], ["--rate", "200"]], ids=["closed", "open"])
def test_serve(api: Api, tmp_path: Path, load: list[str]) -> None:
    path = tmp_path / "serve.json"
    sizes = ["--requests", "6", "--prompt-len", "5", "--new-tokens", "12", "--vocab-size", "100"]
    goals = ["--ttft-ms", "60000", "--e2e-ms", "0.001"]
    bench("serve", "--url", api.server.url, *load, *sizes, *goals, "--json", path, "--commit", "abc")
    report = read(path)
    assert report["settings"]["model"] == "fake"
    assert [row["load"] for row in report["rows"]] == (["c=1", "c=3"] if load[0] == "--concurrency" else ["200 req/s"])
    for row in report["rows"]:
        assert (row["requests"], row["failed"], row["goodput req/s"]) == (6, 0, 0)
        assert row["output tok/s"] == pytest.approx(6 * 12 / row["seconds"])
        assert 0 < row["TTFT p50"] <= row["TTFT p99"] <= row["E2E p99"]
    assert all(request.sampling.ignore_eos for request in api.router.requests)
    assert {len(request.prompt_token_ids) for request in api.router.requests} == {5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["latency", "--model", "tiny", "--set", "max_model_len"], "name=value"),
        (["latency", "--model", "tiny", "--set", "max_modle_len=5"], "max_model_len"),
        (["latency", "--model", "/nowhere"], "/nowhere"),
        (["serve", "--url", "http://127.0.0.1:1"], "does not name its models"),
        (["serve", "--url", "ftp://host", "--model", "m"], "http://host:port"),
    ],
    ids=str,
)
def test_errors_are_of_the_users_kind(arguments: list[str], message: str) -> None:
    from shoal.replicas.errors import ServingError

    result = CliRunner().invoke(app, ["bench", *arguments])
    assert isinstance(result.exception, ServingError)
    assert message in result.exception.message


@pytest.mark.parametrize("arguments", [["latency", "--batches", "1,x"], ["serve", "--concurrency", "1", "--rate", "2"]])
def test_wrong_options(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["bench", *arguments]).exit_code == 2
