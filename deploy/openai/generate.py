"""The steps of a generation request, the same for completions and chat: start, stream or collect, count, close."""

from __future__ import annotations

import secrets

from fastapi import Request
from starlette.responses import Response

from .answers import encode_json
from .api_state import ApiState, ServedModel
from .errors import status_of
from .metrics import ModelMetrics
from .middleware import unless_disconnected
from .response_stream import OutputOptions, ResponseStream
from .sampling import build_request
from .schema import GenerationBody
from .sse import EventStream
from .stream_events import AnswerFormat, collect, stream_events


def new_id(prefix: str) -> str:
    """An id for an answer. Not the client's request id, which may repeat."""
    return f"{prefix}-{secrets.token_hex(16)}"


def start_generation(
    state: ApiState,
    model: ServedModel,
    body: GenerationBody,
    prompts: list[list[int]],
    *,
    answer_id: str,
    offsets: bool = False,
) -> ResponseStream:
    """Check every prompt against the model's limits and make the ResponseStream; nothing runs before its `start`."""
    limits = state.limits(model)
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
    intervals = state.metrics[model.name].inter_token_latency
    return ResponseStream(state.router, model.name, requests, model.tokenizer, options, intervals)


async def respond(request: Request, body: GenerationBody, answer: AnswerFormat, metrics: ModelMetrics) -> Response:
    """Run the generation to its end for a whole answer, or to its first token for a stream."""
    stream = answer.stream

    async def close() -> None:
        await stream.aclose()
        _count(metrics, stream)

    try:
        await unless_disconnected(request.receive, stream.start())
        if body.stream:
            events = stream_events(answer, body.stream_options)
            return EventStream(events, close, {"server-timing": _timing(stream)})
        content = encode_json(answer.whole(await unless_disconnected(request.receive, collect(stream))))
    except BaseException as error:
        if isinstance(error, Exception):
            metrics.failed[status_of(error)] += 1
        await close()
        raise
    await close()
    return Response(content, headers={"server-timing": _timing(stream)}, media_type="application/json")


def _timing(stream: ResponseStream) -> str:
    """A Server-Timing value of the times known so far, in milliseconds; of the first prompt if there are several."""
    times = stream.times[0]
    marks = (("queue", times.arrived, times.dispatched), ("prefill", times.dispatched, times.first_token))
    marks += (("decode", times.first_token, times.finished),)
    known = [(name, end - start) for name, start, end in marks if start is not None and end is not None]
    return ", ".join([f"{name};dur={seconds * 1e3:.1f}" for name, seconds in known])


def _count(metrics: ModelMetrics, stream: ResponseStream) -> None:
    for choice in stream.choices:
        if choice.last_token_at:
            metrics.finished[choice.finish_reason or "abort"] += 1
    for times in stream.times:
        if times.first_token is None:
            continue
        metrics.time_to_first_token.observe(times.first_token - times.arrived)
        if times.finished is not None:
            metrics.request_decode_time.observe(times.finished - times.first_token)
            metrics.e2e_request_latency.observe(times.finished - times.arrived)
