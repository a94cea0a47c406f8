"""An ASGI application under a real uvicorn, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


class HttpServer:
    """`url` is its address; `call` runs a function in its event loop."""

    def __init__(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._server = server
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30), "uvicorn did not start"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive(), "uvicorn did not stop"

    def call(self, function: Callable[[], Any]) -> Any:
        """The result of `function`, run in the server's event loop."""
        assert self._loop is not None

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def _run(self) -> None:
        async def main() -> None:
            self._loop = asyncio.get_running_loop()
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._listener]))
            self._ready.set()  # the socket listens already: early connections wait in its backlog
            await serving

        asyncio.run(main())


@contextmanager
def serve_app(app: Any) -> Iterator[HttpServer]:
    """The application on a free port of loopback, until the block is left."""
    # With its protocol, without which asyncio sets no TCP_NODELAY: answers would wait 40 ms for an acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    server = HttpServer(uvicorn.Server(config), listener)
    server.start()
    try:
        yield server
    finally:
        server.stop()
        listener.close()
