"""Who may ask for what."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from shoal.deploy.openai.api_state import ApiState, ServedModel
from shoal.deploy.openai.auth import KeyRing
from shoal.deploy.openai.errors import HttpError
from shoal.deploy.openai.http_app import create_http_app
from shoal.replicas.text.tokenizer import Tokenizer
from tests.support.fake_router import FakeRouter
from tests.support.http_server import serve_app

ROUTES = ["/v1/models", "/v1/completions", "/tokenize", "/metrics", "/version", "/docs", "/openapi.json", "/nope"]
ADMIN_ROUTES = ["/debug/blocks", "/admin/reset_prefix_cache", "/cluster/state"]


def status(ring: KeyRing, path: str, key: str | None) -> int:
    try:
        ring.check(path, None if key is None else f"Bearer {key}")
    except HttpError as error:
        return error.status
    return 200


@pytest.mark.parametrize("prefix", ["", "/d", "/debug", "/v1"])
def test_admin_routes_are_known_below_any_prefix(tokenizer: Tokenizer, prefix: str) -> None:
    """`/debug/blocks` is not `ebug/blocks` below `/d`, to the check of keys as to the routes."""
    keys = KeyRing.of(["user"], ["boss"])
    app = create_http_app(ApiState(FakeRouter(tokenizer), [ServedModel("fake", tokenizer, "")], keys))

    async def statuses() -> list[int]:
        transport = httpx.ASGITransport(app, root_path=prefix)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            paths = ("/debug/blocks", f"{prefix}/debug/blocks")
            return [(await client.get(path, headers={"authorization": "Bearer user"})).status_code for path in paths]

    first, below = asyncio.run(statuses())
    assert first in (403, 404)
    assert below == 403


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_needs_a_key(path: str) -> None:
    ring = KeyRing.of(["one", "two"], ["boss"])
    for key, expected in (
        ("one", 200),
        ("two", 200),
        ("boss", 200),
        (None, 401),
        ("", 401),
        ("on", 401),
        ("one1", 401),
    ):
        assert status(ring, path, key) == expected
    assert status(ring, path, "x" * 5000) == 401
    with pytest.raises(HttpError):
        ring.check(path, "Basic one")


@pytest.mark.parametrize("path", ADMIN_ROUTES)
def test_the_inside_needs_the_admin_key(path: str) -> None:
    both = KeyRing.of(["one"], ["boss"])
    assert [status(both, path, key) for key in ("boss", "one", "no", None)] == [200, 403, 401, 401]
    only_users = KeyRing.of(["one"])
    assert [status(only_users, path, key) for key in ("one", None)] == [403, 401]
    only_admins = KeyRing.of([], ["boss"])
    assert [status(only_admins, path, key) for key in ("boss", None)] == [200, 401]
    assert status(only_admins, "/v1/models", None) == 200


def test_without_keys_the_inside_is_for_this_machine() -> None:
    for path in ADMIN_ROUTES:
        assert status(KeyRing(local=True), path, None) == 200
        assert status(KeyRing(local=False), path, None) == 403
    assert status(KeyRing(local=False), "/v1/models", None) == 200


def test_probes_are_open() -> None:
    for path in ("/health", "/ready"):
        assert status(KeyRing.of(["one"], ["boss"]), path, None) == 200


def test_keys_over_http(tokenizer: Tokenizer) -> None:
    service = ApiState(FakeRouter(tokenizer), [ServedModel("fake", tokenizer, "")], KeyRing.of(["one"], ["boss"]))
    with serve_app(create_http_app(service)) as server, httpx.Client(base_url=server.url) as http:
        refused = http.get("/v1/models")
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert set(refused.json()["error"]) == {"message", "type", "param", "code"}
        assert "x-request-id" in refused.headers
        assert http.get("/debug/blocks", headers={"authorization": "Bearer one"}).status_code == 403
        assert http.get("/debug/blocks", headers={"authorization": "bearer boss"}).status_code == 200
        assert http.get("/health").status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="one", max_retries=0)
        assert client.completions.create(model="fake", prompt="x").choices[0].text
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="two").models.list()
