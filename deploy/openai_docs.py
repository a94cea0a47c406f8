"""The request bodies in the OpenAPI document; routes read bodies themselves, so FastAPI cannot know them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def request_schema(body: type[BaseModel]) -> dict[str, Any]:
    """What a route adds to its OpenAPI entry for a JSON body of this kind, with all definitions in place."""
    schema = body.model_json_schema(mode="validation")
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items()}
