"""Answers as server-sent events and as whole objects; chat and completions differ in an AnswerFormat."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import UNSET, Struct

from .answers import OptionalUsage, PromptTokensDetails, Usage, encode_json
from .response_stream import Piece, ResponseStream
from .schema import StreamOptions
from .sse import DONE, event

# A text that stands alone in a JSON document: its encoding is the place of a chunk's text.
_PLACEHOLDER = "\0"


class AnswerFormat(Protocol):
    """Turns the pieces of a stream into the structs of one route."""

    stream: ResponseStream

    @property
    def text_only(self) -> bool:
        """Whether chunks differ in nothing but text, except the last one of a choice."""
        ...

    def opening(self, usage: OptionalUsage) -> list[Struct]:
        """Chunks before the first piece."""
        ...

    def chunk(self, piece: Piece, usage: OptionalUsage, *, first: bool) -> Struct:
        """The chunk of one piece; `first` of its choice."""
        ...

    def usage_chunk(self, usage: OptionalUsage) -> Struct:
        """A chunk without choices."""
        ...

    def usage(self) -> Usage: ...

    def whole(self, collected: list[list[Piece]]) -> Struct:
        """The answer of a request that does not stream, from the pieces of each choice."""
        ...


async def collect(stream: ResponseStream) -> list[list[Piece]]:
    """All pieces, by choice."""
    collected: list[list[Piece]] = [[] for _ in stream.choices]
    async for pieces in stream:
        for piece in pieces:
            collected[piece.choice].append(piece)
    return collected


async def stream_events(answer: AnswerFormat, options: StreamOptions | None) -> AsyncIterator[bytes]:
    """Server-sent events: the opening, a chunk per piece, the usage if requested, [DONE].

    A piece that only adds text is written as a prefix, its encoded text and a suffix: no struct is made per token.
    """
    with_usage = options is not None and options.include_usage
    continuous = options is not None and with_usage and options.continuous_usage_stats
    no_usage: OptionalUsage = None if with_usage else UNSET
    fast = answer.text_only and not continuous
    choices = range(len(answer.stream.choices)) if fast else ()
    around = [_around_text(answer, choice, no_usage) for choice in choices]
    started: set[int] = set()
    opening = answer.opening(usage_of(answer.stream, 0) if continuous else no_usage)
    if opening:
        yield b"".join([event(encode_json(chunk)) for chunk in opening])
    async for pieces in answer.stream:
        out = []
        for piece in pieces:
            if fast and piece.finish_reason is None:
                if piece.text:
                    prefix, suffix = around[piece.choice]
                    out.append(prefix + encode_json(piece.text) + suffix)
                continue
            usage = answer.usage() if continuous else no_usage
            out.append(event(encode_json(answer.chunk(piece, usage, first=piece.choice not in started))))
            started.add(piece.choice)
        if out:
            yield b"".join(out)
    if with_usage:
        yield event(encode_json(answer.usage_chunk(answer.usage())))
    yield DONE


def _around_text(answer: AnswerFormat, choice: int, usage: OptionalUsage) -> tuple[bytes, bytes]:
    """The bytes of a text chunk's event before and after its text."""
    piece = Piece(choice, _PLACEHOLDER, (), None, (), None, None)
    encoded = event(encode_json(answer.chunk(piece, usage, first=False)))
    prefix, _, suffix = encoded.rpartition(encode_json(_PLACEHOLDER))
    return prefix, suffix


def usage_of(stream: ResponseStream, num_completion_tokens: int | None = None) -> Usage:
    """OpenAI's usage object, as of now."""
    prompt = stream.num_prompt_tokens
    generated = stream.num_completion_tokens if num_completion_tokens is None else num_completion_tokens
    return Usage(prompt, generated, prompt + generated, PromptTokensDetails(stream.num_cached_tokens))
