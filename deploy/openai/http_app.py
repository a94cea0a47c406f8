"""The HTTP application: routes, and nothing but routes. It runs under Ray Serve and under any ASGI server."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from ... import __version__
from . import models as routes
from .api_state import ApiService
from .chat import create_chat_completion
from .completions import create_completion
from .docs import error_responses, generation_responses, request_schema
from .errors import HttpError, error_response
from .middleware import RequestMiddleware
from .schema import ChatCompletionBody, CompletionBody, DetokenizeBody, TokenizeChatBody, TokenizeTextBody


def create_http_app(service: ApiService, *, sends_request_id: bool = True) -> FastAPI:
    """The application over `service`. `sends_request_id` is off behind a proxy that sends the id back itself."""
    app = FastAPI(title="Shoal", version=__version__, responses=error_responses())
    app.add_middleware(RequestMiddleware, keys=service.keys, sends_id=sends_request_id)
    app.add_exception_handler(HTTPException, _http_exception)
    _add_generation_routes(app, service)
    _add_model_routes(app, service)
    _add_operation_routes(app, service)
    return app


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:256]}: {error.detail.lower()}"
    return error_response(HttpError(error.status_code, message, headers=dict(error.headers or {})))


def _add_generation_routes(app: FastAPI, service: ApiService) -> None:
    @app.post("/v1/completions", responses=generation_responses(), openapi_extra=request_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        return await create_completion(service, request)

    @app.post(
        "/v1/chat/completions",
        responses=generation_responses(),
        openapi_extra=request_schema(ChatCompletionBody),
    )
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(service, request)


def _add_model_routes(app: FastAPI, service: ApiService) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        return routes.list_models(service)

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        return routes.get_model(service, name)

    @app.post("/tokenize", openapi_extra=request_schema(TokenizeTextBody, TokenizeChatBody))
    async def tokenize(request: Request) -> Response:
        return await routes.tokenize(service, request)

    @app.post("/detokenize", openapi_extra=request_schema(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        return await routes.detokenize(service, request)

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        return routes.tokenizer_info(service)


def _add_operation_routes(app: FastAPI, service: ApiService) -> None:
    @app.get("/health")
    @app.get("/ready")
    async def health() -> Response:
        return routes.health(service)

    @app.get("/version")
    async def version() -> Response:
        return routes.version()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return routes.metrics(service)

    @app.get("/debug/blocks")
    async def debug_blocks() -> Response:
        return await routes.debug_blocks(service)

    @app.post("/admin/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        return await routes.reset_prefix_cache(service)
