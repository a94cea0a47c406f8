"""Routes for operators: health probes, metrics, debug and admin routes."""

from __future__ import annotations

from starlette.responses import Response

from ... import __version__
from .answers import Health, Version
from .api_state import ApiState
from .docs import json_response
from .errors import HttpError
from .metrics import CONTENT_TYPE, render


def health(state: ApiState) -> Response:
    """GET /health and /ready. Raises HttpError 503 if a model has no replica that makes progress."""
    reason = state.unhealthy()
    if reason is not None:
        raise HttpError(503, reason, headers={"retry-after": "1"})
    return json_response(Health())


def version() -> Response:
    """GET /version."""
    return json_response(Version(__version__))


def metrics(state: ApiState) -> Response:
    """GET /metrics."""
    return Response(render(state.collector, state.router.collector), headers={"content-type": CONTENT_TYPE})


async def debug_blocks(state: ApiState) -> Response:
    """GET /debug/blocks: the KV blocks that each replica's sequences hold."""
    return json_response({name: await state.router.block_reports(name) for name in state.models})


async def reset_prefix_cache(state: ApiState) -> Response:
    """POST /admin/reset_prefix_cache."""
    return json_response({name: await state.router.reset_prefix_cache(name) for name in state.models})
