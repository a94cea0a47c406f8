"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, always all four."""

from __future__ import annotations

import math

import msgspec
from starlette.responses import Response

from ...replicas.errors import CapacityError, EngineError, RequestError, ServingError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable_error",
}


class HttpError(ServingError):
    """A request that is refused for what it is as HTTP: its route, method, key, type or size."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def __reduce__(self):
        return _rebuild_http_error, (self.status, self.message, self.param, self.code, self.headers)


class ClientGone(ServingError):
    """The client closed its connection before the answer; nobody reads what is returned."""

    def __init__(self) -> None:
        super().__init__("the client closed its connection")


def _rebuild_http_error(
    status: int, message: str, param: str | None, code: str | None, headers: dict[str, str]
) -> HttpError:
    return HttpError(status, message, param=param, code=code, headers=headers)


def status_of(error: Exception) -> int:
    """The HTTP status that tells of `error`. 429 and above may be retried by clients, 4xx may not."""
    if isinstance(error, HttpError | RequestError):
        return error.status
    if isinstance(error, ClientGone):
        return 499
    if isinstance(error, CapacityError):
        return getattr(error, "status", 503)
    return 500


def error_body(error: Exception) -> bytes:
    """The JSON error object of `error`. What is not an error of Shoal's own tells nothing of the inside."""
    status = status_of(error)
    message = error.message if isinstance(error, ServingError) else "internal error; the server's log has the details"
    default = "invalid_request_error" if status < 500 else "server_error"
    return msgspec.json.encode(
        {
            "error": {
                "message": message.encode("utf-8", "replace").decode(),
                "type": _TYPES.get(status, default),
                "param": getattr(error, "param", None),
                "code": getattr(error, "code", None),
            }
        }
    )


def error_response(error: Exception) -> Response:
    """`error` as a response, with the headers that tell clients whether and when to try again."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        headers.update(error.headers)
    if isinstance(error, CapacityError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, EngineError):  # the same request would fail again
        headers["x-should-retry"] = "false"
    return Response(error_body(error), status_of(error), headers, media_type="application/json")
