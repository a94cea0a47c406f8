"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, always all four."""

from __future__ import annotations

import math

from starlette.responses import Response

from ...replicas.errors import CapacityError, EngineError, RequestError, ServingError
from .answers import ErrorAnswer, ErrorDetail, encode_json

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
    """A request that is refused for its route, method, key, content type or size."""

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
    """The client closed its connection before the answer."""

    def __init__(self) -> None:
        super().__init__("the client closed its connection")


def _rebuild_http_error(
    status: int, message: str, param: str | None, code: str | None, headers: dict[str, str]
) -> HttpError:
    return HttpError(status, message, param=param, code=code, headers=headers)


def status_of(error: Exception) -> int:
    """The HTTP status of `error`. Clients may retry 429 and 5xx, and no other 4xx."""
    if isinstance(error, HttpError | RequestError):
        return error.status
    if isinstance(error, ClientGone):
        return 499
    if isinstance(error, CapacityError):
        return getattr(error, "status", 503)
    return 500


def error_body(error: Exception) -> bytes:
    """The JSON error object of `error`. The message of an error that is not Shoal's own is not published."""
    status = status_of(error)
    message = error.message if isinstance(error, ServingError) else "internal error; the server's log has the details"
    default = "invalid_request_error" if status < 500 else "server_error"
    detail = ErrorDetail(
        message.encode("utf-8", "replace").decode(),
        _TYPES.get(status, default),
        getattr(error, "param", None),
        getattr(error, "code", None),
    )
    return encode_json(ErrorAnswer(detail))


def error_response(error: Exception) -> Response:
    """`error` as a response, with the headers that say whether and when to retry."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        headers.update(error.headers)
    if isinstance(error, CapacityError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, EngineError):  # the same request would fail again
        headers["x-should-retry"] = "false"
    return Response(error_body(error), status_of(error), headers, media_type="application/json")
