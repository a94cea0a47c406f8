"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from .api_state import ApiService, ServedModel
from .body_parsing import parse_body
from .generate import new_id, respond, start_generation, usage
from .logprobs import TokenNames, chat_logprobs, prompt_logprobs
from .middleware import read_json
from .response_stream import Piece, ResponseStream
from .schema import ChatCompletionBody, ChatFields
from .sse import DONE, encode_json, event


def render_prompt(model: ServedModel, body: ChatFields) -> str:
    """The prompt that the model's chat template makes of the messages."""
    return model.tokenizer.render_chat(
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        **body.chat_template_kwargs,
    )


async def create_chat_completion(service: ApiService, request: HttpRequest) -> Response:
    """Answer one request, streaming or not. Raises ServingErrors."""
    body = parse_body(ChatCompletionBody, await read_json(request))
    model = service.resolve(body.model)
    # The template writes the special tokens itself, so none are added by default.
    prompts = await model.encode([render_prompt(model, body)], add_special_tokens=body.add_special_tokens)
    answer_id = new_id("chatcmpl")
    generation = start_generation(service, model, body, prompts, answer_id=answer_id)
    answer = ChatAnswer(body, model, generation, answer_id)
    return await respond(request, body, generation, answer, service.metrics[model.name])


class ChatAnswer:
    """Formats one generation as messages of the assistant."""

    def __init__(
        self, body: ChatCompletionBody, model: ServedModel, generation: ResponseStream, answer_id: str
    ) -> None:
        self._body = body
        self._generation = generation
        self._names = TokenNames(model.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._id = answer_id
        self._model = model.name
        self._created = int(time.time())

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: the role, chunks, the usage if it is wanted, [DONE]."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = options is not None and with_usage and options.continuous_usage_stats
        head = self._head("chat.completion.chunk")
        prefix = b"data: " + encode_json(head)[:-1] + b',"choices":[{"index":'
        usage_null = b',"usage":null}\n\n' if with_usage else b"}\n\n"
        plain_end = b'},"logprobs":null,"finish_reason":null}]' + usage_null
        fast = not (continuous or self._body.return_token_ids or self._body.logprobs)
        prefixes = [prefix + b'%d,"delta":{"content":' % choice.index for choice in self._generation.choices]
        yield b"".join([self._opening(head, i, with_usage, continuous) for i in range(len(prefixes))])
        async for pieces in self._generation:
            out = []
            for piece in pieces:
                if fast and piece.finish_reason is None:
                    if piece.text:
                        out.append(prefixes[piece.choice] + encode_json(piece.text) + plain_end)
                    continue
                chunk = {**head, "choices": [self._streamed_choice(piece)]}
                if with_usage:
                    chunk["usage"] = usage(self._generation) if continuous else None
                out.append(event(encode_json(chunk)))
            if out:
                yield b"".join(out)
        if with_usage:
            yield event(encode_json({**head, "choices": [], "usage": usage(self._generation)}))
        yield DONE

    def _opening(self, head: dict[str, Any], index: int, with_usage: bool, continuous: bool) -> bytes:
        """The first chunk of a choice, which has the role."""
        delta = {"role": "assistant", "content": ""}
        chunk = {**head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]}
        if self._body.return_token_ids:
            chunk["prompt_token_ids"] = self._generation.requests[0].prompt_token_ids
        if with_usage:
            chunk["usage"] = usage(self._generation, 0) if continuous else None
        return event(encode_json(chunk))

    def _streamed_choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.choice,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs([piece]),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        collected: list[list[Piece]] = [[] for _ in self._generation.choices]
        async for pieces in self._generation:
            for piece in pieces:
                collected[piece.choice].append(piece)
        answer = {
            **self._head("chat.completion"),
            "choices": [self._choice(index, pieces) for index, pieces in enumerate(collected)],
            "usage": usage(self._generation),
        }
        request, scored = self._generation.requests[0], self._generation.prompt_logprobs[0]
        if self._body.prompt_logprobs is not None and scored is not None:
            answer["prompt_logprobs"] = prompt_logprobs(scored, self._body.prompt_logprobs, self._names)
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = request.prompt_token_ids
        return answer

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": "".join([piece.text for piece in pieces]), "refusal": None},
            "logprobs": self._logprobs(pieces),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
        return choice

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        entries = [entry for piece in pieces for entry in piece.logprobs or ()]
        return chat_logprobs(entries, self._body.top_logprobs or 0, self._names)
