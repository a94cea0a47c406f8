"""The OpenAPI document describes the bodies, answers and keys that the routes use."""

from __future__ import annotations

import json

import jsonschema
import pytest

from shoal.deploy.openai.api_state import ApiState, ServedModel
from shoal.deploy.openai.auth import KeyRing
from shoal.deploy.openai.http_app import create_http_app
from shoal.replicas.text.tokenizer import Tokenizer
from tests.deploy.conftest import Api
from tests.support.fake_router import FakeRouter

USER = [{"role": "user", "content": "x"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": None}]


@pytest.mark.parametrize(
    ("path", "body", "accepted"),
    [
        *[("/v1/completions", {"prompt": p, "max_tokens": 1}, True) for p in ("x", ["x", "y"], [5], [[5], [6, 7]])],
        *[("/v1/completions", {"prompt": p}, False) for p in (5, [], [[]], [-1], None)],
        ("/v1/completions", {"prompt": "x", "stop": "y", "n": None, "metadata": {}, "max_tokens": 5.0}, True),
        ("/v1/completions", {"prompt": "x", "stop": ["y"], "logprobs": None, "model": None}, True),
        ("/v1/completions", {"prompt": "x", "stop": [""]}, False),
        ("/v1/completions", {"prompt": "x", "temperature": 101}, False),
        ("/v1/completions", {"prompt": "x", "colour": 1}, False),
        ("/v1/chat/completions", {"messages": USER, "max_tokens": 1}, True),
        ("/v1/chat/completions", {"messages": PARTS, "max_tokens": 1}, True),
        ("/v1/chat/completions", {"messages": [{"role": "king"}]}, False),
        ("/tokenize", {"prompt": "x"}, True),
        ("/tokenize", {"messages": USER}, True),
        ("/tokenize", {"messages": [{"role": "user", "content": None, "type": None}], "model": None}, True),
        ("/tokenize", {"messages": [{"role": None, "content": "x"}]}, False),
        ("/tokenize", {"text": "x"}, False),
        ("/detokenize", {"tokens": [5]}, True),
        ("/detokenize", {"tokens": [-5]}, False),
    ],
    ids=str,
)
def test_bodies(api: Api, path: str, body: dict, accepted: bool) -> None:
    document = api.http.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema.Draft202012Validator(with_components(schema, document)).is_valid(body) == accepted
    response = api.post(path, body)
    assert (response.status_code == 200) == accepted, response.text
    content = operation["responses"]["200" if accepted else "4XX"]["content"]
    jsonschema.validate(response.json(), with_components(content["application/json"]["schema"], document))


def with_components(schema: dict, document: dict) -> dict:
    """The schema, with the definitions that its references name."""
    return {**schema, "components": document["components"]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2, "logprobs": 2, "echo": True, "prompt_logprobs": 1}),
        ("/v1/completions", {"prompt": "x", "best_of": 3, "return_token_ids": True}),
        ("/v1/chat/completions", {"messages": USER, "n": 2, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", {"messages": USER, "prompt_logprobs": 1, "return_token_ids": True}),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}),
    ],
    ids=str,
)
def test_answers(api: Api, path: str, body: dict) -> None:
    """Whole answers with every optional field."""
    document = api.http.get("/openapi.json").json()
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    limited = body if path == "/tokenize" else {**body, "max_tokens": 4}
    answer = api.post(path, limited)
    assert answer.status_code == 200, answer.text
    jsonschema.validate(answer.json(), with_components(content["application/json"]["schema"], document))


@pytest.mark.parametrize("options", [None, {"include_usage": True, "continuous_usage_stats": True}])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "logprobs": 1, "echo": True, "return_token_ids": True}),
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/chat/completions", {"messages": USER, "logprobs": True, "return_token_ids": True}),
    ],
    ids=str,
)
def test_chunks(api: Api, path: str, body: dict, options: dict | None) -> None:
    document = api.http.get("/openapi.json").json()
    content = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    text = api.post(path, {**body, "max_tokens": 4, "stream": True, "stream_options": options}).text
    *chunks, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert len(chunks) >= 4
    for chunk in chunks:
        parsed = json.loads(chunk.removeprefix("data: "))
        jsonschema.validate(parsed, with_components(content["x-event-schema"], document))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/fake", "/version", "/health", "/ready", "/debug/blocks"])
def test_get_routes(api: Api, path: str) -> None:
    document = api.http.get("/openapi.json").json()
    operation = document["paths"][path.replace("/models/fake", "/models/{name}")]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema
    jsonschema.validate(api.http.get(path).json(), with_components(schema, document))


def test_every_answer_has_a_schema(api: Api) -> None:
    for path, operations in api.http.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert "4XX" in operation["responses"], path
            for content in operation["responses"]["200"]["content"].values():
                assert content["schema"], path


def test_keys_are_documented(tokenizer: Tokenizer) -> None:
    """A key is required where the server refuses requests without one."""

    def security(keys: KeyRing) -> dict[str, list]:
        app = create_http_app(ApiState(FakeRouter(tokenizer), [ServedModel("fake", tokenizer, "")], keys))
        document = app.openapi()
        assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
        return {path: operation["security"] for path, item in document["paths"].items() for operation in item.values()}

    required, optional = [{"bearer": []}], [{}, {"bearer": []}]
    with_keys = security(KeyRing.of(["one"], ["boss"]))
    assert with_keys["/health"] == optional
    assert with_keys["/v1/models"] == with_keys["/debug/blocks"] == required
    only_admin = security(KeyRing.of([], ["boss"]))
    assert (only_admin["/v1/models"], only_admin["/debug/blocks"]) == (optional, required)
    assert set(map(str, security(KeyRing()).values())) == {str(optional)}
