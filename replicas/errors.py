"""The errors that Shoal raises for its users. Standard library only.

ServingError
├── ConfigError            exit status 2.
├── ModelError
├── RequestError           HTTP 400 by default.
│   ├── PromptTooLong
│   └── UnknownModel       HTTP 404.
├── CapacityError          HTTP 429 or 503.
├── ShardGroupError
└── EngineError            HTTP 500.

A message says what is wrong, the numbers, and what to change.
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of all errors that Shoal raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(ServingError, ValueError):
    """The configuration cannot work."""


class ModelError(ServingError):
    """A checkpoint is missing, damaged or not supported; the message names file and tensor."""


class RequestError(ServingError, ValueError):
    """The request can never succeed as it is.

    `param` and `code` are those of OpenAI's error object.
    """

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self):
        return _rebuild_request_error, (type(self), self.message, self.param, self.code)


class PromptTooLong(RequestError):
    """Prompt plus max_tokens exceeds the model's context."""

    def __init__(self, message: str, *, param: str | None = "prompt", code: str | None = "context_length_exceeded"):
        super().__init__(message, param=param, code=code)


class UnknownModel(RequestError):
    """No model of this name is served."""

    status = 404

    def __init__(self, message: str, *, param: str | None = "model", code: str | None = "model_not_found"):
        super().__init__(message, param=param, code=code)


class CapacityError(ServingError):
    """No capacity now; retry in `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self):
        return _rebuild_capacity_error, (type(self), self.message, self.retry_after)


class ShardGroupError(ServingError):
    """The ranks of a model copy could not form a group."""


class EngineError(ServingError):
    """The engine failed while it ran a request."""


def _rebuild_request_error(cls: type[RequestError], message: str, param: str | None, code: str | None) -> RequestError:
    return cls(message, param=param, code=code)


def _rebuild_capacity_error(cls: type[CapacityError], message: str, retry_after: float) -> CapacityError:
    return cls(message, retry_after=retry_after)
