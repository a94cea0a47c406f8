"""`shoal doctor` on the tests' running Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ray

ROOT = Path(__file__).parents[2]


def test_nodes_clocks_and_placement(local_ray: None) -> None:
    address = ray.get_runtime_context().gcs_address
    options = ["--json", "--address", address, "--config", str(ROOT / "deploy" / "tp4.yaml"), "--port", "1025"]
    result = subprocess.run(
        [sys.executable, "-m", "shoal.deploy.cli", "doctor", *options],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        cwd="/tmp",
    )
    assert "Traceback" not in result.stderr, result.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(result.stdout)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    assert found["ray"][0]["message"] == "Ray has 1 node with 2 CPUs and 0 GPUs"
    assert [finding["status"] for finding in (*found["ray"], *found["clocks"])] == ["ok", "ok"]
    assert "1 of 1 replicas fit this Ray, were it empty" in found["placement"][0]["message"]
