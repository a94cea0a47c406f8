"""The HTTP application: all routes, and nothing else. It runs under Ray Serve and under any ASGI server."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from ... import __version__
from . import answers, models, operations
from .api_state import ApiState
from .body_parsing import JsonRoute, request_error
from .chat import create_chat_completion
from .chat_schema import ChatCompletionBody, TokenizeBody
from .completions import create_completion
from .docs import DocumentedApp, answer
from .errors import HttpError, error_response
from .middleware import RequestMiddleware
from .schema import CompletionBody, DetokenizeBody


def create_http_app(state: ApiState, *, sends_request_id: bool = True) -> FastAPI:
    """The application over `state`. `sends_request_id` is off behind a proxy that returns the id itself."""
    app = DocumentedApp(state.keys, title="Shoal", version=__version__)
    app.add_middleware(RequestMiddleware, keys=state.keys, sends_id=sends_request_id)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.include_router(_json_routes(state))
    _add_model_routes(app, state)
    _add_operation_routes(app, state)
    return app


async def _http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, no such method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:256]}: {error.detail.lower()}"
    return error_response(HttpError(error.status_code, message, headers=dict(error.headers or {})))


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(request_error(error.errors()))


def _json_routes(state: ApiState) -> APIRouter:
    router = APIRouter(route_class=JsonRoute)

    @router.post("/v1/completions", responses=answer(answers.Completion, chunk=answers.Completion))
    async def completions(request: Request, body: CompletionBody) -> Response:
        return await create_completion(state, request, body)

    @router.post("/v1/chat/completions", responses=answer(answers.ChatCompletion, chunk=answers.ChatChunk))
    async def chat_completions(request: Request, body: ChatCompletionBody) -> Response:
        return await create_chat_completion(state, request, body)

    @router.post("/tokenize", responses=answer(answers.Tokens))
    async def tokenize(body: TokenizeBody) -> Response:
        return await models.tokenize(state, body)

    @router.post("/detokenize", responses=answer(answers.Text))
    async def detokenize(body: DetokenizeBody) -> Response:
        return models.detokenize(state, body)

    return router


def _add_model_routes(app: FastAPI, state: ApiState) -> None:
    @app.get("/v1/models", responses=answer(answers.ModelList))
    async def list_models() -> Response:
        return models.list_models(state)

    @app.get("/v1/models/{name:path}", responses=answer(answers.ModelCard))
    async def get_model(name: str) -> Response:
        return models.get_model(state, name)

    @app.get("/tokenizer_info", responses=answer(answers.TokenizerInfo))
    async def tokenizer_info() -> Response:
        return models.tokenizer_info(state)


def _add_operation_routes(app: FastAPI, state: ApiState) -> None:
    @app.get("/health", responses=answer(answers.Health))
    @app.get("/ready", responses=answer(answers.Health))
    async def health() -> Response:
        return operations.health(state)

    @app.get("/version", responses=answer(answers.Version))
    async def version() -> Response:
        return operations.version()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return operations.metrics(state)

    @app.get("/debug/blocks", responses=answer(answers.BlockReports))
    async def debug_blocks() -> Response:
        return await operations.debug_blocks(state)

    @app.post("/admin/reset_prefix_cache", responses=answer(answers.CacheResets))
    async def reset_prefix_cache() -> Response:
        return await operations.reset_prefix_cache(state)
