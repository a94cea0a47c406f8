"""`serve run deploy/tp2.yaml`, on a Ray that it starts: the logs of every process of Shoal's are where README says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest

from shoal.deploy.cli import free_port
from shoal.deploy.config import TINY_MODEL
from tests.support.served import START_SECONDS, processes_of, wait_until

pytestmark = pytest.mark.slow


def answers(url: str) -> bool:
    try:
        body = {"model": "tiny", "prompt": "import", "max_tokens": 2}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def text_of(files: list[Path]) -> str:
    return "".join(file.read_text() for file in files)


def test_every_process_of_a_served_file_has_readable_logs(tmp_path: Path) -> None:
    port = free_port("127.0.0.1", 0)
    file = tmp_path / "tp2.yaml"
    file.write_text((TINY_MODEL.parent.parent / "tp2.yaml").read_text().replace("port: 8000", f"port: {port}"))
    folder = tempfile.mkdtemp(prefix="shoal-run-", dir="/tmp")  # short: it holds UNIX sockets
    process = subprocess.Popen(
        [Path(sys.executable).with_name("serve"), "run", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/tmp",
        env={**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"},
    )
    try:
        assert wait_until(lambda: answers(f"http://127.0.0.1:{port}"), START_SECONDS)
        [logs] = Path(folder).glob("ray/session_2*/logs")
        replica = text_of(list(logs.glob("serve/replica_shoal_Replica-tiny_*.log")))
        assert re.search(r"^INFO .* shoal_Replica-tiny \w+ -- a group of 2 ranks is ready", replica, re.MULTILINE), (
            replica
        )
        assert list(logs.glob("serve/replica_shoal_Ingress_*.log"))
        errors = text_of(list(logs.glob("worker-*.err")))
        ready = re.findall(r"^INFO .* shoal_Replica-tiny \w+ rank (\d) -- \S+ is ready on cpu", errors, re.MULTILINE)
        assert sorted(ready) == ["0", "1"], errors
        assert re.search(r"^INFO .* shoal_directory -- replica \w+ of tiny is at ", errors, re.MULTILINE), errors
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert wait_until(lambda: processes_of(process.pid) == []), processes_of(process.pid)
    shutil.rmtree(folder)
