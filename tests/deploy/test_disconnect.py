"""A client that goes away takes its sequences with it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest

from tests.deploy.conftest import Api


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.01)


def send(api: Api, body: dict) -> socket.socket:
    """A connection on which a completion has been asked for."""
    host, port = api.server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"content-length: {len(content)}", "", ""]
    connection.sendall("\r\n".join(lines).encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_before_the_first_token(api: Api, stream: bool, prompt: object) -> None:
    api.server.call(api.router.gate.clear)
    count = 1 if prompt == "x" else 2
    with send(api, {"prompt": prompt, "stream": stream, "max_tokens": 100}):
        wait_until(lambda: api.router.num_streams == count)
    wait_until(lambda: len(api.router.aborted) == count)
    assert api.server.call(lambda: api.router.num_streams) == 0


def test_in_the_middle_of_a_stream(api: Api) -> None:
    with send(api, {"prompt": "x", "stream": True, "max_tokens": 200}) as connection:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        api.server.call(api.router.gate.clear)
    wait_until(lambda: len(api.router.aborted) == 1)


def test_a_client_that_does_not_read_holds_its_own_stream_only(api: Api) -> None:
    with send(api, {"prompt": "x", "stream": True, "max_tokens": 200, "n": 128}) as slow:
        slow.recv(64)
        assert api.post("/v1/completions", {"prompt": "x"}).status_code == 200
    wait_until(lambda: api.router.num_streams == 0)
