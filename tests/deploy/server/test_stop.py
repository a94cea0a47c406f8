"""How a running `shoal serve` ends, by any signal and after the death of any process: nothing of it is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.served import Starting, processes_of, ray_folder, running, start, wait_until

pytestmark = pytest.mark.slow

NEW_TOKENS = 64


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)], ids=str)
def test_a_stream_is_finished_when_the_group_gets_a_signal(number: signal.Signals, status: int) -> None:
    """As `kill %1` and `timeout` do. After a SIGKILL of the supervisor the server stops by itself."""
    server = start("-tp", "2")
    folder = ray_folder(server.process.pid)
    options = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "stream_options": {"include_usage": True}}
    with server.http.stream(
        "POST", "/v1/completions", json={"prompt": "import os\n", "stream": True, **options}
    ) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        json.loads(next(lines))
        os.killpg(server.process.pid, number)
        *_, last, done = lines
    assert done == "[DONE]"
    assert json.loads(last)["usage"]["completion_tokens"] == NEW_TOKENS
    assert server.process.wait(120) == status
    assert server.starting.read_to_the_end().endswith("shoal: stopping\nshoal: stopped\n")
    assert wait_until(lambda: processes_of(server.process.pid) == []), processes_of(server.process.pid)
    assert not folder.exists()


def test_a_stream_that_takes_too_long_for_a_stop_ends_with_an_error() -> None:
    server = start("--max-model-len", "2048", "--num-gpu-blocks-override", "8192")
    body = {"prompt": "import os\n", "n": 32, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        assert "choices" in json.loads(next(lines))
        server.process.send_signal(signal.SIGTERM)
        *_, failed, done = lines
    assert "stopping" in json.loads(failed)["error"]["message"]
    assert done == "[DONE]"
    assert server.process.wait(120) == 0


@pytest.mark.parametrize(
    "reached", ["shoal.deploy.cli", "/gcs_server", "/raylet", "ray::ServeController", "ray::ServeReplica:"]
)
def test_a_start_can_be_stopped_at_any_point(reached: str) -> None:
    starting = Starting()
    session = starting.process.pid
    starting.read_until("shoal: starting")
    assert wait_until(lambda: reached in " ".join(processes_of(session)))
    folders = set(re.findall(r"/tmp/shoal-ray-\w+", " ".join(processes_of(session))))
    os.killpg(session, signal.SIGTERM)
    assert starting.process.wait(120) == 0
    assert starting.read_to_the_end().endswith("shoal: stopping\nshoal: stopped\n"), starting.output
    assert processes_of(session) == []
    assert not [folder for folder in folders if Path(folder).exists()]


def test_a_signal_to_every_process_ends_every_process() -> None:
    """As systemd sends it, unless KillMode is `mixed` or `process`: streams are cut then."""
    server = start()
    folder = ray_folder(server.process.pid)
    for pid, _ in list(running(server.process.pid)):
        os.kill(pid, signal.SIGTERM)
    server.process.wait(120)
    assert processes_of(server.process.pid) == []
    assert not folder.exists()


def test_a_server_whose_control_plane_is_lost_ends_and_keeps_its_logs() -> None:
    """No process would start it again; what is left would answer until it needs it, and then hang."""
    server = start()
    folder = ray_folder(server.process.pid)
    [control_plane] = [pid for pid, command in running(server.process.pid) if "/gcs_server" in command.split()[0]]
    os.kill(control_plane, signal.SIGKILL)
    assert server.process.wait(120) == 1
    assert processes_of(server.process.pid) == []
    output = server.starting.read_to_the_end()
    kept = re.search(r"^shoal: the logs of all processes are kept in (\S+)$", output, re.MULTILINE)
    assert kept is not None, output
    assert (Path(kept[1]) / "gcs_server.out").exists()
    shutil.rmtree(kept[1])
    assert not folder.exists()
