"""Reads JSON bodies with limits of size and time, and turns validation findings into errors that name the field."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from ...replicas.errors import RequestError
from .errors import HttpError

MAX_BODY_BYTES = 8 << 20
MAX_DISCARDED_BYTES = 128 << 20
BODY_TIMEOUT_S = 10.0


class JsonRoute(APIRoute):
    """A route whose JSON body is read and decoded by Shoal; FastAPI validates it as the route's typed parameter."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_and_handle(request: Request) -> Response:
            return await handle(await JsonRequest.read(request))

        return read_and_handle


class JsonRequest(Request):
    """A request whose JSON body was read and decoded."""

    raw: bytes
    value: Any

    @classmethod
    async def read(cls, request: Request) -> JsonRequest:
        """Read and decode the body of `request`. Raises HttpError 400, 408, 413 or 415."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or request.headers.get("content-encoding", "identity") != "identity":
            raise HttpError(415, f"the body must be plain application/json, not {kind or 'of no type'}")
        loaded = cls(request.scope, request.receive)
        loaded.raw = await _read_body(request)
        loaded.value = _decode(loaded.raw)
        return loaded

    async def body(self) -> bytes:
        return self.raw

    async def json(self) -> Any:
        return self.value


async def _read_body(request: Request) -> bytes:
    """The body. Raises HttpError 408 or 413.

    A body above the limit is read up to MAX_DISCARDED_BYTES before the refusal. If the server closed the connection
    while the client still writes, TCP would reset it and the client would never see the refusal.
    """
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


def _decode(body: bytes) -> Any:
    """The JSON value. Raises HttpError 400.

    msgspec refuses NaN, lone surrogates, bytes that are not UTF-8 and trailing text, which json.loads accepts in part.
    It stops at Python's recursion limit.
    """
    try:
        return msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise HttpError(400, f"the body is not UTF-8: {error.reason}", code="invalid_json") from None
    except RecursionError:
        raise HttpError(400, "the body is nested too deeply", code="invalid_json") from None
    except msgspec.MsgspecError as error:
        raise HttpError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def request_error(findings: Sequence[Any]) -> RequestError:
    """The first finding of pydantic or FastAPI as an error of one sentence, with `param` set to the field.

    A validator that raises a RequestError sets the whole message itself.
    """
    first = findings[0]
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, RequestError):
        return cause
    location = first["loc"][1:]  # FastAPI puts "body" first
    if not location:
        return not_an_object(None)
    path = ".".join(str(part)[:64] for part in location)  # keys come from the client, with any length
    if first["type"] == "missing":
        return RequestError(f"{path} is required", param=path, code="missing_required_parameter")
    if first["type"] == "value_error":
        return RequestError(f"{path} {cause}", param=path)
    reason = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "model_attributes_type":  # pydantic goes on about attributes, which JSON does not have
        reason = "input should be a valid dictionary"
    got = first["input"]
    shown = f" (got {got!r})" if isinstance(got, int | float) else f" (got {_json_type(got)})"
    return RequestError(f"{path}: {reason}{shown}", param=path)


def not_an_object(value: Any) -> RequestError:
    return RequestError(f"the body must be a JSON object, not {_json_type(value)}")


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
