"""Middleware of every route: request ids, keys, errors, and clients that disconnect."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...replicas.errors import ServingError
from .auth import KeyRing
from .errors import ClientGone, error_response

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


class RequestMiddleware:
    """ASGI middleware: checks keys, gives every request an id, and turns every exception into an error object.

    `sends_id` is off behind a proxy that returns the id itself, as Ray Serve's does.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, *, sends_id: bool = True) -> None:
        self.app = app
        self.keys = keys
        self.sends_id = sends_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self.sends_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self.keys.check(_route_path(scope), headers.get("authorization"))
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.info("request %s: the client went away (499)", request_id)
        except Exception as error:
            if started:
                raise
            if not isinstance(error, ServingError):
                logger.exception("request %s failed", request_id)
            await error_response(error)(scope, receive, send_with_id)


def _route_path(scope: Scope) -> str:
    """The path below the application's own prefix, by the router's own rule: a prefix is whole segments."""
    root, path = scope.get("root_path", ""), scope["path"]
    below = path[len(root) :]
    return below if path.startswith(root) and (not below or below[0] == "/") else path


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client closes its connection. Call it only after the body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`. If the client disconnects first, cancel it and raise ClientGone."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
