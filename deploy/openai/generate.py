"""The course of a generation request, the same for completions and chat: start, stream or collect, count, close."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .api_state import ApiService, ServedModel
from .errors import status_of
from .metrics import ModelMetrics
from .middleware import unless_disconnected
from .response_stream import OutputOptions, ResponseStream
from .sampling import build_request
from .schema import GenerationBody
from .sse import EventStream, encode_json


class Answer(Protocol):
    """Turns a generation into what the client gets."""

    def events(self) -> AsyncIterator[bytes]: ...

    async def whole(self) -> dict[str, Any]: ...


def new_id(prefix: str) -> str:
    """An id for an answer. Not the client's request id: that may come twice."""
    return f"{prefix}-{secrets.token_hex(16)}"


def start_generation(
    service: ApiService,
    model: ServedModel,
    body: GenerationBody,
    prompts: list[list[int]],
    *,
    answer_id: str,
    offsets: bool = False,
) -> ResponseStream:
    """Check every prompt against the model's limits and make the ResponseStream; nothing runs before its `start`."""
    limits = service.limits(model)
    requests = [
        build_request(body, prompt, request_id=f"{answer_id}-{i}", limits=limits, tokenizer=model.tokenizer)
        for i, prompt in enumerate(prompts)
    ]
    options = OutputOptions(
        stops=tuple(dict.fromkeys(body.stop)),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        min_tokens=body.min_tokens,
        offsets=offsets,
    )
    intervals = service.metrics[model.name].inter_token_latency
    return ResponseStream(service.router, model.name, requests, model.tokenizer, options, intervals)


async def respond(
    request: HttpRequest, body: GenerationBody, generation: ResponseStream, answer: Answer, metrics: ModelMetrics
) -> Response:
    """Run the generation to its end for a plain answer, or to its first token for a stream."""

    async def close() -> None:
        await generation.aclose()
        _count(metrics, generation)

    try:
        await unless_disconnected(request.receive, generation.start())
        if body.stream:
            return EventStream(answer.events(), close, {"server-timing": _timing(generation)})
        content = await unless_disconnected(request.receive, answer.whole())
    except BaseException as error:
        if isinstance(error, Exception):
            metrics.failed[status_of(error)] += 1
        await close()
        raise
    await close()
    return Response(encode_json(content), headers={"server-timing": _timing(generation)}, media_type="application/json")


def usage(generation: ResponseStream, num_completion_tokens: int | None = None) -> dict[str, Any]:
    """OpenAI's usage object, as of now."""
    generated = generation.num_completion_tokens if num_completion_tokens is None else num_completion_tokens
    return {
        "prompt_tokens": generation.num_prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": generation.num_prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached_tokens},
    }


def _timing(generation: ResponseStream) -> str:
    """A Server-Timing value of what is known by now, in milliseconds; of several prompts, the first one's."""
    times = generation.times[0]
    marks = (("queue", times.arrived, times.dispatched), ("prefill", times.dispatched, times.first_token))
    marks += (("decode", times.first_token, times.finished),)
    known = [(name, end - start) for name, start, end in marks if start is not None and end is not None]
    return ", ".join([f"{name};dur={seconds * 1e3:.1f}" for name, seconds in known])


def _count(metrics: ModelMetrics, generation: ResponseStream) -> None:
    for choice in generation.choices:
        if choice.last_token_at:
            metrics.finished[choice.finish_reason or "abort"] += 1
    for times in generation.times:
        if times.first_token is None:
            continue
        metrics.time_to_first_token.observe(times.first_token - times.arrived)
        if times.finished is not None:
            metrics.request_decode_time.observe(times.finished - times.first_token)
            metrics.e2e_request_latency.observe(times.finished - times.arrived)
