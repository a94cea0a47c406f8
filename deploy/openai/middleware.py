"""What surrounds every route: request ids, keys, errors, and bodies read with limits of size and time."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...replicas.errors import ServingError
from .auth import KeyRing
from .errors import ClientGone, HttpError, error_response

MAX_BODY_BYTES = 8 << 20
MAX_DISCARDED_BYTES = 128 << 20
BODY_TIMEOUT_S = 10.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_Result = TypeVar("_Result")
logger = logging.getLogger(__name__)


class RequestMiddleware:
    """ASGI middleware: checks keys, gives every request an id, and turns every exception into an error object.

    `sends_id` is off behind a proxy that sends the id back itself, as Ray Serve's does: there would be two.
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


async def read_json(request: Request) -> Any:
    """The request's body, decoded. Raises HttpError 400, 408, 413 or 415.

    msgspec refuses what JSON does not have (NaN, lone surrogates, bytes that are not UTF-8, trailing text) and stops
    at Python's recursion limit.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
        raise HttpError(415, f"the body must be plain application/json, not {kind or 'of no type'}")
    body = await _read_body(request)
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is not UTF-8: {error.reason}", code="invalid_json") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from None


async def _read_body(request: Request) -> bytes:
    """The body. One that is too large is read to its end before it is refused, as far as that goes: a connection
    that is closed while its client still writes is reset, and the client never sees the refusal."""
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= MAX_BODY_BYTES:
                    chunks.append(chunk)
                elif size > MAX_DISCARDED_BYTES:
                    break
    except TimeoutError:
        raise HttpError(
            408, f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s", headers={"connection": "close"}
        ) from None
    if size > MAX_BODY_BYTES:
        raise HttpError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", headers={"connection": "close"})
    return b"".join(chunks)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client closes its connection. Only after the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled if the client goes away first; ClientGone is raised then."""
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
