"""The tree of errors that Shoal raises for its users.

ServingError
├── ConfigError            the configuration cannot work; the process exits with status 2
├── ModelError             a model folder, tensor or architecture that cannot be served
├── RequestError           this request can never succeed here; HTTP 400 unless a subclass says otherwise
│   ├── PromptTooLong
│   └── UnknownModel       HTTP 404
├── CapacityError          not now: try again later; HTTP 429 or 503
├── ShardGroupError        the ranks of a model copy could not come together
└── EngineError            the engine failed while it worked on a request; HTTP 500

A message says what is wrong, the numbers, and what to change. Only the standard library is imported here.
"""

from __future__ import annotations


class ServingError(Exception):
    """Base of every error that Shoal raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(ServingError, ValueError):
    """The configuration cannot work; nothing was started."""


class ModelError(ServingError):
    """A checkpoint is missing, truncated, misshapen or of an unknown architecture; names the file and the tensor."""


class RequestError(ServingError, ValueError):
    """The request can never succeed as it stands.

    `param` is the request's field at fault and `code` a short machine-readable reason, as in OpenAI's error object.
    """

    status = 400

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self):
        return _rebuild_request_error, (type(self), self.message, self.param, self.code)


class PromptTooLong(RequestError):
    """Prompt plus the tokens asked for do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = "prompt", code: str | None = "context_length_exceeded"):
        super().__init__(message, param=param, code=code)


class UnknownModel(RequestError):
    """No model of this name is served."""

    status = 404

    def __init__(self, message: str, *, param: str | None = "model", code: str | None = "model_not_found"):
        super().__init__(message, param=param, code=code)


class CapacityError(ServingError):
    """There is no room now. `retry_after` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self):
        return _rebuild_capacity_error, (type(self), self.message, self.retry_after)


class ShardGroupError(ServingError):
    """The ranks of a model copy could not come together: one is missing, failed, or does not fit the others."""


class EngineError(ServingError):
    """The engine failed while it worked on a request that it had accepted."""


def _rebuild_request_error(cls: type[RequestError], message: str, param: str | None, code: str | None) -> RequestError:
    return cls(message, param=param, code=code)


def _rebuild_capacity_error(cls: type[CapacityError], message: str, retry_after: float) -> CapacityError:
    return cls(message, retry_after=retry_after)
