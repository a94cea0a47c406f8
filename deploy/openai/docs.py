"""Bodies and errors in the OpenAPI document; routes read and write them themselves, so FastAPI cannot know them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from .body_parsing import WITHOUT_EFFECT

_NULLABLE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "properties": {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": _NULLABLE_TEXT,
        "code": _NULLABLE_TEXT,
    },
    "required": ["message", "type", "param", "code"],
    "additionalProperties": False,
}
_ERROR_BODY = {"type": "object", "properties": {"error": _ERROR}, "required": ["error"], "additionalProperties": False}


def error_responses() -> dict[int | str, dict[str, Any]]:
    """What every route may answer beside its success."""
    content = {"application/json": {"schema": _ERROR_BODY}}
    return {
        "4XX": {"description": "The request is refused", "content": content},
        "5XX": {"description": "The server cannot answer", "content": content},
    }


def generation_responses() -> dict[int | str, dict[str, Any]]:
    """The success of a generation, in its two forms."""
    return {200: {"content": {"application/json": {}, "text/event-stream": {"schema": {"type": "string"}}}}}


def request_schema(*bodies: type[BaseModel]) -> dict[str, Any]:
    """What a route adds to its OpenAPI entry for a JSON body of one of these kinds, with all definitions in place."""
    schemas = [_body_schema(body) for body in bodies]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _body_schema(body: type[BaseModel]) -> dict[str, Any]:
    """Unknown fields are refused and some known ones do nothing; the model itself sees neither."""
    schema = body.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    schema["properties"] = {key: {} for key in sorted(WITHOUT_EFFECT)} | schema["properties"]
    schema["additionalProperties"] = False
    return _inlined(schema, definitions)


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    """The schema without references, and with null for every optional field of every object."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    inlined = {key: _inlined(value, definitions) for key, value in node.items() if key != "properties"}
    if "properties" in node:
        required = node.get("required", ())
        fields = {key: _inlined(field, definitions) for key, field in node["properties"].items()}
        inlined["properties"] = {
            key: field if key in required else {"anyOf": [field, {"type": "null"}]} for key, field in fields.items()
        }
    return inlined
