"""What the OpenAPI document says of bodies is what the routes accept."""

from __future__ import annotations

import jsonschema
import pytest

from tests.deploy.conftest import Api

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
    operation = api.http.get("/openapi.json").json()["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema.Draft202012Validator(schema).is_valid(body) == accepted
    response = api.post(path, body)
    assert (response.status_code == 200) == accepted, response.text
    if not accepted:
        jsonschema.validate(response.json(), operation["responses"]["4XX"]["content"]["application/json"]["schema"])
