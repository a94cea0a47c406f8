"""POST /v1/completions."""

from __future__ import annotations

import time

from fastapi import Request
from msgspec import Struct
from starlette.responses import Response

from ...replicas.protocol import Logprob
from .answers import Completion, CompletionChoice, CompletionLogprobs, OptionalUsage, Usage
from .api_state import ApiState, ServedModel
from .generate import new_id, respond, start_generation
from .logprobs import TokenNames, completion_logprobs, prompt_logprobs
from .response_stream import Piece, ResponseStream
from .schema import CompletionBody
from .stream_events import usage_of


async def create_completion(state: ApiState, request: Request, body: CompletionBody) -> Response:
    """Answer one request, streaming or not. Raises ServingErrors."""
    model = state.resolve(body.model)
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    prompts = [prompt for prompt in body.prompt if isinstance(prompt, list)]
    if texts:  # all are of one kind
        prompts = await model.encode(texts, add_special_tokens=body.add_special_tokens)
    answer_id = new_id("cmpl")
    with_offsets = body.logprobs is not None
    stream = start_generation(state, model, body, prompts, answer_id=answer_id, offsets=with_offsets)
    return await respond(request, body, CompletionFormat(body, model, stream, answer_id), state.metrics[model.name])


class CompletionFormat:
    """Formats a stream as completions, after the echo of their prompts if it was requested."""

    def __init__(self, body: CompletionBody, model: ServedModel, stream: ResponseStream, answer_id: str) -> None:
        self.stream = stream
        self._body = body
        self._tokenizer = model.tokenizer
        self._names = TokenNames(model.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._head = (answer_id, int(time.time()), model.name)
        self._echoes = [self._echo(i) if body.echo else "" for i in range(len(stream.requests))]
        # With max_tokens 0 the engine still generates one token, which no answer contains.
        self._echo_only = body.max_tokens == 0

    def _echo(self, prompt: int) -> str:
        """The text of a prompt: the client's own, or decoded where it sent tokens or tokens were cut off."""
        sent = self._body.prompt[prompt]
        if isinstance(sent, str) and self._body.truncate_prompt_tokens is None:
            return sent
        return self._tokenizer.decode(self.stream.requests[prompt].prompt_token_ids, skip_special_tokens=False)

    @property
    def text_only(self) -> bool:
        return not (self._body.return_token_ids or self._body.logprobs is not None or self._body.echo)

    def usage(self) -> Usage:
        return usage_of(self.stream, 0 if self._echo_only else None)

    def opening(self, usage: OptionalUsage) -> list[Struct]:
        return []

    def chunk(self, piece: Piece, usage: OptionalUsage, *, first: bool) -> Completion:
        prompt = piece.choice // self._body.n
        choice = self._choice(prompt, piece.choice, [self._visible(piece)], with_echo=first)
        if self._body.return_token_ids and not first:
            choice.prompt_token_ids = None
        return Completion(*self._head, [choice], usage)

    def usage_chunk(self, usage: OptionalUsage) -> Completion:
        return Completion(*self._head, [], usage)

    def whole(self, collected: list[list[Piece]]) -> Completion:
        samples, wanted = self._body.num_samples, self._body.n
        choices: list[CompletionChoice] = []
        for prompt, scored in enumerate(self.stream.prompt_logprobs):
            group = collected[prompt * samples : (prompt + 1) * samples]
            if wanted < samples:
                group = sorted(group, key=_cumulative_logprob, reverse=True)[:wanted]
            for pieces in group:
                visible = [self._visible(piece) for piece in pieces]
                choice = self._choice(prompt, len(choices), visible, with_echo=True)
                if self._body.prompt_logprobs is not None and scored is not None:
                    choice.prompt_logprobs = prompt_logprobs(scored, self._body.prompt_logprobs, self._names)
                choices.append(choice)
        return Completion(*self._head, choices, self.usage())

    def _choice(self, prompt: int, index: int, pieces: list[Piece], *, with_echo: bool) -> CompletionChoice:
        text = "".join([piece.text for piece in pieces])
        choice = CompletionChoice(
            index,
            self._echoes[prompt] + text if with_echo else text,
            self._logprobs(prompt, pieces, with_echo=with_echo),
            pieces[-1].finish_reason,
            pieces[-1].stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
            choice.prompt_token_ids = self.stream.requests[prompt].prompt_token_ids
        return choice

    def _visible(self, piece: Piece) -> Piece:
        if not self._echo_only:
            return piece
        return piece._replace(text="", token_ids=(), logprobs=() if piece.logprobs is not None else None, offsets=())

    def _logprobs(self, prompt: int, pieces: list[Piece], *, with_echo: bool) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        token_ids: list[int] = []
        entries: list[Logprob | None] = []
        offsets: list[int] = []
        base = len(self._echoes[prompt])
        scored = self.stream.prompt_logprobs[prompt]
        if self._body.echo and with_echo and scored is not None:
            token_ids += self.stream.requests[prompt].prompt_token_ids
            entries += scored
            offsets += self._prompt_offsets(token_ids)
        for piece in pieces:
            token_ids += piece.token_ids
            entries += piece.logprobs or ()
            offsets += [base + offset for offset in piece.offsets]
        return completion_logprobs(token_ids, entries, offsets, self._body.logprobs, self._names)

    def _prompt_offsets(self, token_ids: list[int]) -> list[int]:
        decoder, offsets, length = self._tokenizer.detokenizer(skip_special_tokens=False), [], 0
        for token_id in token_ids:
            offsets.append(length)
            length += len(decoder.feed((token_id,)))
        return offsets


def _cumulative_logprob(pieces: list[Piece]) -> float:
    return sum(entry.logprob for piece in pieces for entry in piece.logprobs or ())
