"""A client that goes away takes its sequences with it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI

from shoal.deploy.openai.api_state import ApiState, ServedModel
from shoal.deploy.openai.http_app import create_http_app
from shoal.replicas.text.tokenizer import Tokenizer
from tests.deploy.conftest import Api
from tests.support.fake_router import FakeRouter


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.01)


def _posted(app: FastAPI, body: dict, gone: asyncio.Event) -> asyncio.Task[None]:
    """The application's task of one completion; the client goes away when `gone` is set."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await gone.wait()
            return {"type": "http.disconnect"}
        return messages.pop()

    async def send(_: MutableMapping[str, Any]) -> None:
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    return asyncio.ensure_future(app(scope, receive, send))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
@pytest.mark.parametrize("how", ["disconnects", "is cancelled", "is cancelled again"])
def test_at_every_turn_of_the_event_loop(tokenizer: Tokenizer, how: str, prompt: object, stream: bool) -> None:
    """From before the request is read until after its last byte is sent: nothing is left running."""

    async def leave_at(turn: int, router: FakeRouter, app: FastAPI) -> bool:
        gone = asyncio.Event()
        task = _posted(app, {"prompt": prompt, "stream": stream, "max_tokens": 6}, gone)
        for _ in range(turn):
            await asyncio.sleep(0)
        ended = task.done()
        if how == "disconnects":
            gone.set()
        for _ in range({"disconnects": 0, "is cancelled": 1, "is cancelled again": 3}[how]):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(10):  # what was cancelled twice ends in the background
            await asyncio.sleep(0)
        assert router.num_streams == 0
        return ended

    async def every_turn() -> int:
        router, turn = FakeRouter(tokenizer), 0
        app = create_http_app(ApiState(router, [ServedModel("fake", tokenizer, "/models/fake")]))
        while not await leave_at(turn, router, app):
            turn += 1
        return turn

    assert asyncio.run(every_turn()) > 10


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
