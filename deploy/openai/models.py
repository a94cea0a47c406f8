"""The routes beside generation: models, tokens, probes, and the inside for admins."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ... import __version__
from ...replicas.errors import RequestError
from .api_state import ApiService, ServedModel
from .body_parsing import parse_body
from .chat import render_prompt
from .errors import HttpError
from .metrics import CONTENT_TYPE, render
from .middleware import read_json
from .schema import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from .sse import encode_json


def json_response(content: Any) -> Response:
    return Response(encode_json(content), media_type="application/json")


def list_models(service: ApiService) -> Response:
    """GET /v1/models."""
    return json_response({"object": "list", "data": [_card(service, model) for model in service.models.values()]})


def get_model(service: ApiService, name: str) -> Response:
    """GET /v1/models/{id}. Raises UnknownModel."""
    return json_response(_card(service, service.resolve(name)))


def _card(service: ApiService, model: ServedModel) -> dict[str, Any]:
    replicas = service.replicas(model)
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "shoal",
        "root": model.root,
        "parent": None,
        "max_model_len": min((info.max_model_len for info, _ in replicas), default=None),
    }


async def tokenize(service: ApiService, request: HttpRequest) -> Response:
    """POST /tokenize, of a prompt or of messages."""
    value = await read_json(request)
    if isinstance(value, dict) and value.get("messages") is not None:
        body = parse_body(TokenizeChatBody, value)
        model = service.resolve(body.model)
        text = render_prompt(model, body)
    else:
        body = parse_body(TokenizeTextBody, value)
        model = service.resolve(body.model)
        text = body.prompt
    [tokens] = await model.encode([text], add_special_tokens=body.add_special_tokens)
    names = [model.tokenizer.token_name(token) for token in tokens] if body.return_token_strs else None
    limit = service.limits(model).max_model_len
    return json_response({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": names})


async def detokenize(service: ApiService, request: HttpRequest) -> Response:
    """POST /detokenize."""
    body = parse_body(DetokenizeBody, await read_json(request))
    model = service.resolve(body.model)
    size = model.tokenizer.vocab_size
    if body.tokens and max(body.tokens) >= size:
        raise RequestError(f"token id {max(body.tokens)} is outside the vocabulary 0..{size - 1}", param="tokens")
    return json_response({"prompt": model.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)})


def tokenizer_info(service: ApiService) -> Response:
    """GET /tokenizer_info, of the only model or the first: what tokenizer_config.json says, and the chat template."""
    model = next(iter(service.models.values()))
    settings = {key: value for key, value in model.tokenizer.settings.items() if not key.startswith("_")}
    return json_response({**settings, "chat_template": model.tokenizer.chat_template})


def version() -> Response:
    """GET /version."""
    return json_response({"version": __version__})


def health(service: ApiService) -> Response:
    """GET /health and /ready. Raises HttpError 503 when some model has no replica that makes progress."""
    reason = service.unhealthy()
    if reason is not None:
        raise HttpError(503, reason, headers={"retry-after": "1"})
    return json_response({"status": "ok"})


def metrics(service: ApiService) -> Response:
    """GET /metrics."""
    return Response(render(service.collector, service.router.collector), headers={"content-type": CONTENT_TYPE})


async def debug_blocks(service: ApiService) -> Response:
    """GET /debug/blocks: how each replica's sequences hold KV blocks."""
    return json_response({name: await service.router.block_reports(name) for name in service.models})


async def reset_prefix_cache(service: ApiService) -> Response:
    """POST /admin/reset_prefix_cache."""
    return json_response({name: await service.router.reset_prefix_cache(name) for name in service.models})
