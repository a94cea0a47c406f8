"""From a JSON object to a request body, with errors that name the field."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from ...replicas.errors import RequestError
from ..nearest import did_you_mean

BodyType = TypeVar("BodyType", bound=BaseModel)

# Fields that OpenAI's or vLLM's servers know and this one does not serve, and the values that ask for nothing.
NOT_AVAILABLE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# Fields that change nothing about an answer here.
WITHOUT_EFFECT = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
    }
)
_REFUSED = {
    "chat_template": "templates come from the model's folder, never from a client",
    "request_id": "send it as the x-request-id header",
}


def parse_body(kind: type[BodyType], value: Any) -> BodyType:
    """`value`, decoded JSON, as a body. Raises RequestError with `param` set to the field at fault."""
    if not isinstance(value, dict):
        raise RequestError(f"the body must be a JSON object, not {_json_type(value)}")
    given = {key: item for key, item in value.items() if item is not None}
    for key in given.keys() - kind.model_fields.keys():
        _refuse(kind, key, given[key])
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _request_error(error) from None


def field_error(param: str, message: str) -> PydanticCustomError:
    """For validators that look at several fields: an error that names one of them."""
    return PydanticCustomError("field", "{message}", {"param": param, "message": message})


def _refuse(kind: type[BaseModel], key: str, value: Any) -> None:
    if key in WITHOUT_EFFECT:
        return
    if key in _REFUSED:
        raise RequestError(f"{key} is not accepted: {_REFUSED[key]}", param=key, code="unsupported_parameter")
    if key in NOT_AVAILABLE:
        if value in NOT_AVAILABLE[key]:
            return
        raise RequestError(f"{key} is not available on this server", param=key, code="unsupported_parameter")
    hint = did_you_mean(key, kind.model_fields)
    raise RequestError(f"unknown field {key[:64]!r}{hint}", param=key[:64], code="unknown_parameter")


def _request_error(error: ValidationError) -> RequestError:
    """The first of pydantic's findings as one sentence."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx") or {}
    if first["type"] == "field":
        return RequestError(f"{context['param']} {context['message']}", param=context["param"])
    path = ".".join(str(part)[:64] for part in first["loc"])  # keys are the client's own, of any length
    if first["type"] == "missing":
        return RequestError(f"{path} is required", param=path, code="missing_required_parameter")
    if first["type"] == "value_error":
        return RequestError(f"{path} {context['error']}", param=path)
    reason = first["msg"][:1].lower() + first["msg"][1:]
    got = first["input"]
    shown = f" (got {got!r})" if isinstance(got, int | float) else f" (got {_json_type(got)})"
    return RequestError(f"{path}: {reason}{shown}", param=path)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
