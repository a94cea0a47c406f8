"""Everything that is wrong with a request is a 4xx with OpenAI's error object, and nothing reaches the router."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ValidationError

from shoal.cluster.wire.errors import NoReplica, QueueFull
from shoal.deploy.openai.chat_schema import ChatCompletionBody
from shoal.deploy.openai.schema import CompletionBody, DetokenizeBody
from shoal.replicas.errors import CapacityError, RequestError
from tests.deploy.conftest import Api

JSON = {"content-type": "application/json"}
LONG = "ab" * 3000
USER = [{"role": "user", "content": "x"}]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after its form was checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


# field, value, what the message must tell
BAD_FIELDS = [
    ("prompt", [], "empty"),
    ("prompt", "", "empty"),
    ("prompt", [[]], "empty"),
    ("prompt", 5, "string"),
    ("prompt", {"a": 1}, "string"),
    ("prompt", [1, "a"], "mixes"),
    ("prompt", [True], "mixes"),
    ("prompt", [[1], ["a"]], "mixes"),
    ("prompt", ["a"] * 129, "128"),
    ("prompt", [100_000], "100000"),
    ("prompt", [-1], "-1"),
    ("prompt", [2**70], str(2**70)),
    ("prompt", None, "required"),
    ("prompt", LONG, "256"),
    ("max_tokens", -1, "-1"),
    ("max_tokens", 0, "echo"),
    ("max_tokens", 256, "256"),
    ("max_tokens", 10**30, "less than"),
    ("max_tokens", "5", "integer"),
    ("max_tokens", 5.5, "integer"),
    ("max_tokens", True, "integer"),
    ("min_tokens", 17, "min_tokens"),
    ("n", 0, "1"),
    ("n", 129, "128"),
    ("best_of", 129, "128"),
    ("temperature", -0.1, "0"),
    ("temperature", "hot", "number"),
    ("temperature", 101, "100"),
    ("top_p", 0, "0"),
    ("top_p", 1.01, "1"),
    ("top_k", -2, "-1"),
    ("min_p", 1.1, "1"),
    ("presence_penalty", 2.1, "2"),
    ("frequency_penalty", -2.1, "-2"),
    ("repetition_penalty", 0, "0"),
    ("seed", 2**64, "less"),
    ("seed", 0.5, "integer"),
    ("logit_bias", {"x": 1}, "'x'"),
    ("logit_bias", {"-1": 1}, "'-1'"),
    ("logit_bias", {"1": 101}, "100"),
    ("logit_bias", {"100000": 1}, "100000"),
    ("logit_bias", {str(i): 0 for i in range(1025)}, "1024"),
    ("logit_bias", [1], "dictionary"),
    ("logprobs", 21, "20"),
    ("logprobs", True, "integer"),
    ("prompt_logprobs", 21, "20"),
    ("stop", ["x"] * 17, "16"),
    ("stop", "", "1 character"),
    ("stop", [""], "1 character"),
    ("stop", [1], "string"),
    ("stop", "x" * 1025, "1024"),
    ("stop_token_ids", [100_000], "100000"),
    ("allowed_token_ids", [], "1 item"),
    ("allowed_token_ids", [100_000], "100000"),
    ("bad_words", [""], "1 character"),
    ("stream", "yes", "boolean"),
    ("stream_options", {"include_usage": True}, "stream: true"),
    ("cache_salt", 5, "string"),
    ("priority", 2**40, "less"),
    ("truncate_prompt_tokens", 0, "empty"),
    ("echo", 1, "boolean"),
    ("tools", [{"type": "function"}], "not available"),
    ("response_format", {"type": "json_object"}, "not available"),
    ("structured_outputs", {"regex": "a+"}, "not available"),
    ("use_beam_search", True, "not available"),
    ("suffix", "end", "not available"),
    ("temperatur", 1, "did you mean 'temperature'"),
    ("x" * 500, 1, "unknown field"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS, ids=lambda value: str(value)[:24])
def test_bad_fields_of_completions(api: Api, field: str, value: object, message: str) -> None:
    error = error_of(api.post("/v1/completions", {"prompt": "x", field: value}), 400)
    assert message in error["message"]
    assert error["param"] is not None
    assert error["param"].split(".")[0] in (field[:64], "prompt")
    assert error["type"] == "invalid_request_error"
    assert api.router.requests == []


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "1 item"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": ["hello"]}, "messages.0", "dictionary"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "not permitted"),
        ({"messages": USER, "top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"messages": USER, "logprobs": 2}, "logprobs", "boolean"),
        ({"messages": USER, "max_tokens": 0}, "max_tokens", "1"),
        ({"messages": USER, "max_completion_tokens": 300}, "prompt", "256"),
        ({"messages": USER, "prompt": "x"}, "prompt", "unknown field"),
        ({"messages": USER, "chat_template": "{{x}}"}, "chat_template", "folder"),
        ({"messages": USER, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs", "messages"),
        ({"messages": USER, "continue_final_message": True}, "continue_final_message", "add_generation_prompt"),
        ({"messages": [{"role": "user", "content": LONG}]}, "prompt", "256"),
    ],
)  # fmt: skip
def test_bad_chats(api: Api, body: dict, param: str, message: str) -> None:
    error = error_of(api.post("/v1/chat/completions", body), 400)
    assert message in error["message"]
    assert error["param"] == param
    assert api.router.requests == []


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"prompt": "x"',
        b'{"prompt": "x"} trailing',
        b'{"temperature": NaN, "prompt": "x"}',
        b'{"temperature": Infinity, "prompt": "x"}',
        b'{"temperature": 1e999, "prompt": "x"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 x"}',
        b'{"prompt": "\\ud800\\u0041"}',
        b"[" * 10_000,
        b"[" * 10_000 + b"]" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[]",
        b'"text"',
        b"null",
        b"5",
        b"\xef\xbb\xbf{}",
        b"{'prompt': 'x'}",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_bodies_that_are_no_json_object(api: Api, path: str, body: bytes) -> None:
    error_of(api.http.post(path, content=body, headers=JSON), 400)
    assert api.router.requests == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_other_content_types(api: Api, kind: str) -> None:
    error_of(api.http.post("/v1/completions", content=b"{}", headers={"content-type": kind}), 415)


def test_compressed_bodies(api: Api) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    error_of(api.http.post("/v1/completions", content=b"{}", headers=headers), 415)


def test_large_bodies(api: Api) -> None:
    error_of(api.http.post("/v1/completions", content=b" " * (8 * 2**20 + 1), headers=JSON), 413)

    def without_length() -> Iterator[bytes]:
        for _ in range(160):
            yield b" " * 65536

    error_of(api.http.post("/v1/completions", content=without_length(), headers=JSON), 413)
    just_fits = b'{"prompt": "x", "max_tokens": 1}'.ljust(8 * 2**20)
    assert api.http.post("/v1/completions", content=just_fits, headers=JSON).status_code == 200


def test_routes_and_methods(api: Api) -> None:
    for path in ("/nope", "/v1", "/v1/completions/x", "/v1/embeddings", "/%00", "/..%2f"):
        error_of(api.http.get(path), 404)
    error_of(api.http.get("/v1/completions"), 405)
    error_of(api.http.delete("/v1/models"), 405)


def test_unknown_models(api: Api) -> None:
    for body in ({"model": "fak", "prompt": "x"}, {"model": "", "prompt": "x"}):
        error = error_of(api.post("/v1/completions", body), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'fake'" in error["message"]
    error_of(api.http.get("/v1/models/other"), 404)
    with pytest.raises(openai.NotFoundError):
        api.openai.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])


def test_the_context_is_used_to_the_last_token(api: Api) -> None:
    """256 tokens: one below, exactly, and one above."""
    for length in (239, 240):
        assert api.post("/v1/completions", {"prompt": [5] * length, "max_tokens": 16}).status_code == 200
    error = error_of(api.post("/v1/completions", {"prompt": [5] * 241, "max_tokens": 16}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "257" in error["message"]
    assert "256" in error["message"]
    # Without max_tokens the answer takes what is left.
    answer = api.post("/v1/completions", {"prompt": [5] * 250}).json()
    assert answer["usage"]["completion_tokens"] == 6
    error_of(api.post("/v1/completions", {"prompt": [5] * 256}), 400)


@pytest.mark.parametrize(
    "body",
    [
        {"n": 128, "max_tokens": 1},
        {"temperature": 0},
        {"temperature": 1e-9},
        {"top_k": -1},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"stop": ["x"] * 16},
        {"logit_bias": {str(i): -100 for i in range(300)}},
        {"logprobs": 20},
        {"logprobs": 0},
        {"prompt": ["a"] * 128, "max_tokens": 1},
        {"temperature": None, "n": None, "stop": None, "stream": None},
        {"max_tokens": 5.0, "n": 2.0, "seed": 7.0, "logprobs": 1.0},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
        {
            "metadata": {"a": "b"},
            "store": True,
            "service_tier": "auto",
            "user": "u",
            "suffix": None,
            "logit_bias": None,
        },
    ],
    ids=lambda body: str(body)[:24],
)
def test_bounds_are_inside(api: Api, body: dict) -> None:
    response = api.post("/v1/completions", {"prompt": "x", **body})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, {"prompt": "x", "allowed_token_ids": [""] * 10_000}),
        (CompletionBody, {"prompt": "x", "logit_bias": {str(i): "" for i in range(10_000)}}),
        (CompletionBody, {"prompt": "x", "stop_token_ids": [""] * 10_000}),
        (DetokenizeBody, {"tokens": [""] * 10_000}),
        (ChatCompletionBody, {"messages": USER, "chat_template_kwargs": {str(i): None for i in range(10_000)}}),
    ],
    ids=str,
)
def test_a_long_list_of_nonsense_is_refused_at_its_first_item(kind: type[BaseModel], body: dict) -> None:
    """Millions of findings would hold up every other request of the process."""
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() == 1


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "x", "k" * 100_000: 1}]},
        {"messages": USER, "stream": True, "stream_options": {"k" * 100_000: 1}},
        {"messages": USER, "chat_template_kwargs": {"k" * 100_000: 1}},
        {"messages": USER, "logit_bias": {"k" * 100_000: 1}},
        {"messages": USER, "model": "k" * 100_000},
        {"messages": [{"role": "k" * 100_000, "content": "x"}]},
    ],
    ids=lambda body: str(body)[:40],
)
def test_errors_do_not_send_back_what_they_refuse(api: Api, body: dict) -> None:
    response = api.post("/v1/chat/completions", body)
    assert response.status_code in (400, 404)
    assert len(response.content) < 1000


def test_detokenize_checks_ids(api: Api) -> None:
    assert "100000" in error_of(api.post("/detokenize", {"tokens": [100_000]}), 400)["message"]
    error_of(api.post("/detokenize", {"tokens": [-1]}), 400)
    error_of(api.post("/detokenize", {"tokens": "x"}), 400)
    assert api.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "headers"),
    [
        (RequestError("too many blocks", param="n"), 400, {}),
        (QueueFull("queue is full", retry_after=0.2), 429, {"retry-after": "1"}),
        (NoReplica("none", retry_after=2.5), 503, {"retry-after": "3"}),
        (CapacityError("later", retry_after=7), 503, {"retry-after": "7"}),
        (RuntimeError("secret inside"), 500, {}),
    ],
    ids=str,
)
def test_what_the_router_refuses(api: Api, refusal: Exception, status: int, headers: dict, stream: bool) -> None:
    """A stream that cannot start has a status, too."""
    api.router.refuse = refusal
    response = api.post("/v1/completions", {"prompt": "x", "stream": stream})
    error = error_of(response, status)
    assert headers.items() <= dict(response.headers).items()
    assert "secret" not in error["message"]


def test_a_failing_sequence_is_a_500_that_is_not_retried(api: Api) -> None:
    api.router.fail_at = 0
    response = api.post("/v1/completions", {"prompt": "x"})
    assert "boom" in error_of(response, 500)["message"]
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_a_failing_stream_ends_with_an_error_event(api: Api, prompt: object) -> None:
    api.router.fail_at = 3
    response = api.post("/v1/completions", {"prompt": prompt, "stream": True})
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "boom" in error["message"]
    with pytest.raises(openai.APIError, match="boom"):
        list(api.openai.completions.create(model="fake", prompt="x", stream=True))


def test_no_replica(api: Api) -> None:
    api.router.up = False
    for path in ("/health", "/ready"):
        response = api.http.get(path)
        error_of(response, 503)
        assert response.headers["retry-after"] == "1"
    response = api.post("/v1/completions", {"prompt": "x"})
    error_of(response, 503)
    assert response.headers["retry-after"] == "3"
    api.router.up = True
    assert api.http.get("/health").status_code == 200


def test_request_ids(api: Api) -> None:
    assert api.http.get("/health", headers={"x-request-id": "my-id_1.2"}).headers["x-request-id"] == "my-id_1.2"
    for bad in ("a b", "x" * 129, "<script>", ""):
        given = api.http.get("/nope", headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32
