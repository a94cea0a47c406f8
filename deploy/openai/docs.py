"""The OpenAPI document: answers, errors and keys. FastAPI itself adds the bodies, which are typed parameters."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.responses import Response

from . import answers
from .answers import encode_json
from .auth import KeyRing

_REF = "#/components/schemas/{name}"
_ANSWERS = (
    answers.Completion,
    answers.ChatCompletion,
    answers.ChatChunk,
    answers.ModelCard,
    answers.ModelList,
    answers.Tokens,
    answers.Text,
    answers.Version,
    answers.Health,
    answers.TokenizerInfo,
    answers.BlockReports,
    answers.CacheResets,
    answers.ErrorAnswer,
)
_SCHEMAS, _COMPONENTS = msgspec.json.schema_components(_ANSWERS, ref_template=_REF)
_SCHEMA_OF = {repr(kind): schema for kind, schema in zip(_ANSWERS, _SCHEMAS, strict=True)}


def json_response(content: object) -> Response:
    """A 200 with a struct, or another value that msgspec encodes."""
    return Response(encode_json(content), media_type="application/json")


def answer(kind: Any, *, chunk: Any = None) -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`: a 200 of `kind`, and a stream of events that hold a `chunk` each."""
    content: dict[str, Any] = {"application/json": {"schema": _SCHEMA_OF[repr(kind)]}}
    if chunk is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}, "x-event-schema": _SCHEMA_OF[repr(chunk)]}
    return {200: {"description": "The answer", "content": content}}


def error_responses() -> dict[int | str, dict[str, Any]]:
    """The errors of every route."""
    content = {"application/json": {"schema": _SCHEMA_OF[repr(answers.ErrorAnswer)]}}
    return {
        "4XX": {"description": "The request is refused", "content": content},
        "5XX": {"description": "The server cannot answer", "content": content},
    }


class DocumentedApp(FastAPI):
    """A FastAPI application whose document also has the answers' schemas and the keys that each route needs."""

    def __init__(self, keys: KeyRing, **settings: Any) -> None:
        super().__init__(responses=error_responses(), **settings)
        self._keys = keys

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(_COMPONENTS)
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation["security"] = [{"bearer": []}] if self._keys.needs_key(path) else [{}, {"bearer": []}]
        assert self.openapi_schema is not None, "FastAPI keeps the document"
        return self.openapi_schema
