from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from shoal.deploy.openai.api_state import ApiState, ServedModel
from shoal.deploy.openai.http_app import create_http_app
from shoal.replicas.text.tokenizer import Tokenizer
from tests.support.fake_router import FakeRouter
from tests.support.http_server import HttpServer, serve_app
from tests.support.text_model import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@dataclass
class Api:
    """The HTTP application under a real server, over a fake router."""

    server: HttpServer
    router: FakeRouter
    tokenizer: Tokenizer
    http: httpx.Client
    openai: openai.OpenAI

    def post(self, path: str, body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def expected(self, max_tokens: int, sample: int = 0) -> str:
        """The text of the fake router's first `max_tokens` tokens."""
        request = self.router.requests[-1]
        return self.tokenizer.decode(self.router.output(request, sample)[:max_tokens])


@pytest.fixture(scope="module")
def running_api(tokenizer: Tokenizer) -> Iterator[Api]:
    router = FakeRouter(tokenizer)
    service = ApiState(router, [ServedModel("fake", tokenizer, "/models/fake")])
    with serve_app(create_http_app(service)) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
        yield Api(server, router, tokenizer, http, client)
        client.close()


@pytest.fixture
def api(running_api: Api) -> Api:
    """The running API with a router that behaves."""
    router = running_api.router
    router.fail_at, router.refuse, router.up = None, None, True
    router.requests.clear()
    router.aborted.clear()
    running_api.server.call(router.gate.set)
    return running_api
