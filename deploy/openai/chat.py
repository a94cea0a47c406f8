"""POST /v1/chat/completions."""

from __future__ import annotations

import time

from fastapi import Request
from msgspec import UNSET, Struct
from starlette.responses import Response

from .answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    ChunkChoice,
    Delta,
    OptionalUsage,
    Usage,
)
from .api_state import ApiState, ServedModel
from .chat_schema import ChatCompletionBody, ChatFields
from .generate import new_id, respond, start_generation
from .logprobs import TokenNames, chat_logprobs, prompt_logprobs
from .response_stream import Piece, ResponseStream
from .stream_events import usage_of


def render_prompt(model: ServedModel, body: ChatFields) -> str:
    """The prompt that the model's chat template makes of the messages."""
    return model.tokenizer.render_chat(
        [message.for_template() for message in body.messages],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        **body.chat_template_kwargs,
    )


async def create_chat_completion(state: ApiState, request: Request, body: ChatCompletionBody) -> Response:
    """Answer one request, streaming or not. Raises ServingErrors."""
    model = state.resolve(body.model)
    # The template writes the special tokens itself, so none are added by default.
    prompts = await model.encode([render_prompt(model, body)], add_special_tokens=body.add_special_tokens)
    answer_id = new_id("chatcmpl")
    stream = start_generation(state, model, body, prompts, answer_id=answer_id)
    return await respond(request, body, ChatFormat(body, model, stream, answer_id), state.metrics[model.name])


class ChatFormat:
    """Formats a stream as messages of the assistant."""

    def __init__(self, body: ChatCompletionBody, model: ServedModel, stream: ResponseStream, answer_id: str) -> None:
        self.stream = stream
        self._body = body
        self._names = TokenNames(model.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._head = (answer_id, int(time.time()), model.name)

    @property
    def text_only(self) -> bool:
        return not (self._body.return_token_ids or self._body.logprobs)

    def usage(self) -> Usage:
        return usage_of(self.stream)

    def opening(self, usage: OptionalUsage) -> list[Struct]:
        """The first chunk of each choice has the role."""
        delta = Delta(role="assistant", content="")
        chunks = [ChatChunk(*self._head, [ChunkChoice(c.index, delta, None, None)], usage) for c in self.stream.choices]
        if self._body.return_token_ids:
            for chunk in chunks:
                chunk.prompt_token_ids = self.stream.requests[0].prompt_token_ids
        return [*chunks]

    def chunk(self, piece: Piece, usage: OptionalUsage, *, first: bool) -> ChatChunk:
        choice = ChunkChoice(
            piece.choice, Delta(content=piece.text or UNSET), self._logprobs([piece]), piece.finish_reason
        )
        if piece.finish_reason is not None:
            choice.stop_reason = piece.stop_reason
        if self._body.return_token_ids:
            choice.token_ids = piece.token_ids
        return ChatChunk(*self._head, [choice], usage)

    def usage_chunk(self, usage: OptionalUsage) -> ChatChunk:
        return ChatChunk(*self._head, [], usage)

    def whole(self, collected: list[list[Piece]]) -> ChatCompletion:
        choices = [self._choice(index, pieces) for index, pieces in enumerate(collected)]
        answer = ChatCompletion(*self._head, choices, self.usage())
        request, scored = self.stream.requests[0], self.stream.prompt_logprobs[0]
        if self._body.prompt_logprobs is not None and scored is not None:
            answer.prompt_logprobs = prompt_logprobs(scored, self._body.prompt_logprobs, self._names)
        if self._body.return_token_ids:
            answer.prompt_token_ids = request.prompt_token_ids
        return answer

    def _choice(self, index: int, pieces: list[Piece]) -> ChatChoice:
        message = ChatMessage("".join([piece.text for piece in pieces]))
        last = pieces[-1]
        choice = ChatChoice(index, message, self._logprobs(pieces), last.finish_reason, last.stop_reason)
        if self._body.return_token_ids:
            choice.token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
        return choice

    def _logprobs(self, pieces: list[Piece]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        entries = [entry for piece in pieces for entry in piece.logprobs or ()]
        return chat_logprobs(entries, self._body.top_logprobs or 0, self._names)
