"""`shoal doctor` on a machine without GPUs, through the command line, with faults that such a machine can have."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.deploy.config import TINY_MODEL
from tests.support.processes import wait_for_children, wait_for_end
from tests.support.served import wait_until

DEPLOY = TINY_MODEL.parent.parent
pytestmark = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="what is found differs where there are GPUs")


def doctor(*arguments: str, open_files: int | None = None, **env: str) -> tuple[int, str]:
    """Exit status and output."""

    def limit() -> None:
        if open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    command = [sys.executable, "-m", "shoal.deploy.cli", "doctor", *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, **env}, preexec_fn=limit, cwd="/tmp"
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout


def findings(*arguments: str, **more: Any) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """Exit status, and what is wrong or else by check."""
    status, output = doctor("--json", *arguments, **more)
    report = json.loads(output)
    assert report["ok"] == (status == 0)
    by_check: dict[str, list[dict[str, Any]]] = {}
    for finding in report["findings"]:
        assert set(finding) == {"check", "status", "message", "remedy", "figures"}
        assert finding["message"]
        assert finding["remedy"] or finding["status"] in ("ok", "skipped")
        by_check.setdefault(finding["check"], []).append(finding)
    return status, by_check


@pytest.fixture
def broken_torch(tmp_path: Path) -> Any:
    """Makes a torch of the given source the one that is imported."""

    def write(source: str) -> dict[str, str]:
        (tmp_path / "torch.py").write_text(source)
        return {"PYTHONPATH": os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))}

    return write


def test_a_machine_without_gpus_is_looked_at_all_the_same() -> None:
    status, found = findings("--address", "none", "--config", str(DEPLOY / "tp2_pp2.yaml"), "--port", "1025")
    assert status == 0
    (gpus,) = found["gpus"]
    assert gpus["status"] == "skipped"
    assert "NCCL cannot be checked" in gpus["message"]
    (gloo,) = found["gloo"]
    assert gloo["status"] == "ok"
    assert set(gloo["figures"]) == {"0-1", "1-0", "sum"}
    assert all(rate > 0 for rate in gloo["figures"].values())
    (placement,) = found["placement"]
    assert "1 of 1 replicas fit this machine; each needs 5 processes" in placement["message"]
    (versions,) = found["versions"]
    assert {"torch", "ray", "transformers", "triton"} <= versions["figures"].keys()
    assert found["shared memory"][0]["figures"]["free_bytes"] > 0
    assert "ray" not in found


def test_faults_are_named_with_a_remedy() -> None:
    env = {"NCCL_SOCKET_IFNAME": "nowhere0", "NCCL_P2P_DISABLE": "1", "RAY_SERVE_HAPROXY_BINARY_PATH": "/bin/false"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        status, found = findings("--address", "none", "--port", port, open_files=512, **env)
    assert status == 1
    assert f"127.0.0.1:{port}" in found["ports"][0]["message"]
    assert found["ports"][0]["status"] == "warning"
    assert (found["open files"][0]["status"], found["open files"][0]["figures"]["soft"]) == ("wrong", 512)
    assert "/bin/false does not run" in found["haproxy"][0]["message"]
    slow, wrong = found["settings"][1:]
    assert (slow["status"], slow["remedy"]) == ("warning", "unset NCCL_P2P_DISABLE")
    assert (wrong["status"], wrong["message"][:27]) == ("wrong", "NCCL_SOCKET_IFNAME=nowhere0")
    assert found["gloo"][0]["status"] == "ok"
    assert found["loopback"][0]["status"] == "ok"


def test_a_torch_that_cannot_be_loaded(broken_torch: Any) -> None:
    status, found = findings("--address", "none", **broken_torch("raise ImportError('libcudart.so.13: not found')"))
    assert status == 1
    assert "libcudart.so.13: not found" in found["gpus"][0]["message"]
    assert "torch.cuda.is_available()" in found["gpus"][0]["remedy"]


def test_what_hangs_is_ended(broken_torch: Any) -> None:
    env = broken_torch("import time\nwhile True:\n    time.sleep(1)\n")
    status, output = doctor("--address", "none", "--limit", "2", **env)
    assert status == 1
    text = " ".join(output.split())
    assert "torch could not be asked for GPUs: it had no answer within 2 s" in text
    assert "rank 0 of 2 failed while the ranks met: it had no answer within 2 s" in text
    assert text.endswith("2 wrong")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("applications: {}", "no list of applications"),
        ("a: [", "is not YAML"),
        ("applications: []\nhttp_options: [1]", "http_options"),
        ("applications: [{args: {modles: []}}]", "did you mean 'models'?"),
        ("applications: [{args: [tiny]}]", "args of an application is ['tiny']; it must have fields"),
        (
            "applications: [{args: {llm_configs: [{model_loading_config: {model_id: tiny}, "
            "engine_kwargs: {tensor_parallel_size: 3}}]}}]",
            "this model takes 1, 2, 4, 8",
        ),
        (None, "cannot be read"),
    ],
)
def test_a_configuration_that_cannot_work(content: str | None, message: str, tmp_path: Path, broken_torch: Any) -> None:
    path = tmp_path / "serve.yaml"
    if content is not None:
        path.write_text(content)
    status, found = findings("--address", "none", "--config", str(path), **broken_torch("raise ImportError('no')"))
    assert status == 1
    assert message in found["configuration"][0]["message"]


def test_a_ray_that_is_not_there(broken_torch: Any) -> None:
    env = broken_torch("raise ImportError('no')")
    status, found = findings("--address", "127.0.0.1:1", "--limit", "2", **env)
    assert status == 1
    (ray,) = found["ray"]
    assert "Ray cannot be joined" in ray["message"]
    assert "RAY_AUTH_MODE" in ray["remedy"]


def test_a_doctor_that_is_asked_to_end_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal.deploy.cli", "doctor", "--address", "none"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        assert wait_until(lambda: any(tmp_path.glob("shoal-doctor-*")))  # of a probe, which starts next
        probes = wait_for_children(set(), 1, process.pid)
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    wait_for_end(set(probes))
