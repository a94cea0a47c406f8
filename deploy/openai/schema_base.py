"""What all request bodies share: nulls count as absent, unknown fields are errors, OpenAPI states both."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, WithJsonSchema, model_validator

from ...replicas.errors import RequestError
from ..nearest import did_you_mean
from .body_parsing import not_an_object

# Fields of OpenAI's or vLLM's API that this server does not serve, with the values that request nothing.
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
# Fields that are accepted and change nothing about an answer.
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


def without_nulls(value: Any) -> Any:
    """An object without its null fields; any other value unchanged."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def text_or(*others: dict[str, Any]) -> WithJsonSchema:
    """The published schema of a field that accepts a string or one of `others` and that a validator normalises."""
    return WithJsonSchema({"anyOf": [{"type": "string"}, *others]})


def _publish_nulls(schema: dict[str, Any], _: type[BaseModel]) -> None:
    """Let every optional property of the published schema be null."""
    required = schema.get("required", ())
    for key, field in schema.get("properties", {}).items():
        if key not in required:
            schema["properties"][key] = {"anyOf": [field, {"type": "null"}]}


def _publish_body(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    _publish_nulls(schema, kind)
    schema["properties"] = {key: {} for key in sorted(WITHOUT_EFFECT)} | schema["properties"]


class JsonObject(BaseModel):
    """An object inside a body."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", protected_namespaces=(), json_schema_extra=_publish_nulls
    )

    @model_validator(mode="before")
    @classmethod
    def _before(cls, value: Any) -> Any:
        return without_nulls(value)


class Body(JsonObject):
    """Base of every request body."""

    model_config = ConfigDict(json_schema_extra=_publish_body)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _before(cls, value: Any) -> Any:
        """Drop nulls and fields without effect; refuse unknown fields."""
        if not isinstance(value, dict):
            raise not_an_object(value)
        given = without_nulls(value)
        unknown = given.keys() - cls.model_fields.keys()
        if unknown:
            for key in [key for key in given if key in unknown]:  # in the order of the body
                _check_unknown(cls, key, given.pop(key))
        return given


def _check_unknown(kind: type[BaseModel], key: str, value: Any) -> None:
    """Raise RequestError unless the field is known to change nothing."""
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
