"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...replicas.protocol import Logprob
from .api_state import ApiService, ServedModel
from .body_parsing import parse_body
from .generate import new_id, respond, start_generation, usage
from .logprobs import TokenNames, completion_logprobs, prompt_logprobs
from .middleware import read_json
from .response_stream import Piece, ResponseStream
from .schema import CompletionBody
from .sse import DONE, encode_json, event


async def create_completion(service: ApiService, request: HttpRequest) -> Response:
    """Answer one request, streaming or not. Raises ServingErrors."""
    body = parse_body(CompletionBody, await read_json(request))
    model = service.resolve(body.model)
    texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
    prompts = [prompt for prompt in body.prompt if isinstance(prompt, list)]
    if texts:  # all are of one kind
        prompts = await model.encode(texts, add_special_tokens=body.add_special_tokens)
    answer_id = new_id("cmpl")
    with_offsets = body.logprobs is not None
    generation = start_generation(service, model, body, prompts, answer_id=answer_id, offsets=with_offsets)
    answer = CompletionAnswer(body, model, generation, answer_id)
    return await respond(request, body, generation, answer, service.metrics[model.name])


class CompletionAnswer:
    """Formats one generation, with the echo of its prompts where that is wanted."""

    def __init__(self, body: CompletionBody, model: ServedModel, generation: ResponseStream, answer_id: str) -> None:
        self._body = body
        self._generation = generation
        self._tokenizer = model.tokenizer
        self._names = TokenNames(model.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._head = {
            "id": answer_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.name,
        }
        self._echoes = [self._echo(i) for i in range(len(generation.requests))] if body.echo else []
        # No token is wanted beside the echo; the engine made one because it must.
        self._echo_only = body.max_tokens == 0

    def _echo(self, prompt: int) -> str:
        """The text of a prompt: as it was sent, or decoded where tokens were sent or dropped."""
        sent = self._body.prompt[prompt]
        if isinstance(sent, str) and self._body.truncate_prompt_tokens is None:
            return sent
        return self._tokenizer.decode(self._generation.requests[prompt].prompt_token_ids, skip_special_tokens=False)

    # ---- streaming

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: chunks, the usage if it is wanted, [DONE]."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        continuous = options is not None and with_usage and options.continuous_usage_stats
        head = b"data: " + encode_json(self._head)[:-1] + b',"choices":[{"index":'
        usage_null = b',"usage":null}\n\n' if with_usage else b"}\n\n"
        plain_end = b',"logprobs":null,"finish_reason":null,"stop_reason":null}]' + usage_null
        fast = not (continuous or self._body.return_token_ids or self._body.logprobs is not None or self._body.echo)
        heads = [head + b'%d,"text":' % choice.index for choice in self._generation.choices]
        started: set[int] = set()
        async for pieces in self._generation:
            out = []
            for piece in pieces:
                if fast and piece.finish_reason is None:
                    if piece.text:
                        out.append(heads[piece.choice] + encode_json(piece.text) + plain_end)
                    continue
                choice = self._streamed_choice(piece, first=piece.choice not in started)
                started.add(piece.choice)
                chunk = {**self._head, "choices": [choice]}
                if with_usage:
                    chunk["usage"] = self._usage() if continuous else None
                out.append(event(encode_json(chunk)))
            if out:
                yield b"".join(out)
        if with_usage:
            yield event(encode_json({**self._head, "choices": [], "usage": self._usage()}))
        yield DONE

    def _streamed_choice(self, piece: Piece, *, first: bool) -> dict[str, Any]:
        prompt = piece.choice // self._body.n
        piece = self._shown(piece)
        echo = self._echoes[prompt] if first and self._body.echo else ""
        choice: dict[str, Any] = {
            "index": piece.choice,
            "text": echo + piece.text,
            "logprobs": self._logprobs(prompt, [piece], with_echo=first),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = piece.token_ids
            choice["prompt_token_ids"] = self._generation.requests[prompt].prompt_token_ids if first else None
        return choice

    # ---- the whole answer

    async def whole(self) -> dict[str, Any]:
        """The answer of a request that does not stream."""
        collected: list[list[Piece]] = [[] for _ in self._generation.choices]
        async for pieces in self._generation:
            for piece in pieces:
                collected[piece.choice].append(self._shown(piece))
        samples, wanted = self._body.num_samples, self._body.n
        choices = []
        for prompt in range(len(self._generation.requests)):
            of_prompt = collected[prompt * samples : (prompt + 1) * samples]
            if wanted < samples:
                of_prompt = sorted(of_prompt, key=_cumulative_logprob, reverse=True)[:wanted]
            choices += [self._choice(prompt, len(choices) + i, pieces) for i, pieces in enumerate(of_prompt)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _choice(self, prompt: int, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join([piece.text for piece in pieces])
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echoes[prompt] + text if self._body.echo else text,
            "logprobs": self._logprobs(prompt, pieces, with_echo=True),
            "finish_reason": pieces[-1].finish_reason,
            "stop_reason": pieces[-1].stop_reason,
        }
        scored = self._generation.prompt_logprobs[prompt]
        if self._body.prompt_logprobs is not None and scored is not None:
            choice["prompt_logprobs"] = prompt_logprobs(scored, self._body.prompt_logprobs, self._names)
        if self._body.return_token_ids:
            choice["token_ids"] = [token_id for piece in pieces for token_id in piece.token_ids]
            choice["prompt_token_ids"] = self._generation.requests[prompt].prompt_token_ids
        return choice

    # ---- shared

    def _shown(self, piece: Piece) -> Piece:
        if not self._echo_only:
            return piece
        return piece._replace(text="", token_ids=(), logprobs=() if piece.logprobs is not None else None, offsets=())

    def _usage(self) -> dict[str, Any]:
        return usage(self._generation, 0 if self._echo_only else None)

    def _logprobs(self, prompt: int, pieces: list[Piece], *, with_echo: bool) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        token_ids: list[int] = []
        entries: list[Logprob | None] = []
        offsets: list[int] = []
        base = len(self._echoes[prompt]) if self._body.echo else 0
        scored = self._generation.prompt_logprobs[prompt]
        if self._body.echo and with_echo and scored is not None:
            token_ids += self._generation.requests[prompt].prompt_token_ids
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
