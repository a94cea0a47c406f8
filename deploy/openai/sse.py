"""Server-sent events. The bytes of a token's event are a prefix, the encoded text, and a suffix."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ...replicas.errors import ServingError
from .errors import error_body
from .middleware import wait_for_disconnect

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def event(data: bytes) -> bytes:
    """One server-sent event of JSON text, which has no line break."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Sends events as they arrive. Starlette's StreamingResponse guarantees none of these:

    - `close` runs in every case: at the end, on an error, on a disconnect. It is shielded from a second cancellation.
    - An error after the start becomes an error event, then [DONE]: no stream ends without finish reasons or an error.
    - A client that reads slowly blocks `send`; no event is taken from `events` meanwhile.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        # Without these, proxies such as nginx buffer the events.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump = asyncio.ensure_future(self._pump(send))
        watcher = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait((pump, watcher), return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                pump.result()
            else:
                logger.info("request %s: the client went away (499)", scope.get("state", {}).get("request_id"))
        finally:
            # Shielded: a second cancellation would leave the request running in the engine.
            await asyncio.shield(self._end(pump, watcher))

    async def _end(self, *tasks: asyncio.Task[None]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except OSError:  # the connection broke while it was written to
            return
        except Exception as error:
            if not isinstance(error, ServingError):
                logger.exception("a stream failed")
            failed = event(error_body(error)) + DONE
            await send({"type": "http.response.body", "body": failed, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
