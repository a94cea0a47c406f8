"""One HTTP request's sequences: from the router's token deltas to pieces of text.

A request has one prompt or several, and each has one sequence or several; `ResponseStream` numbers them as choices
(prompt-major), merges their streams, detokenises, and ends a sequence at its stop string. Leaving it, in whatever
way, aborts what still runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ...cluster.histograms import Histogram
from ...cluster.router.routed_request import RequestTimes
from ...replicas.errors import EngineError
from ...replicas.protocol import FinishReason, Logprob, Request, TokenDelta
from ...replicas.text.detokenizer import StopStrings
from ...replicas.text.tokenizer import Tokenizer


class TokenSource(Protocol):
    """The part of cluster.router.Router that generates."""

    def end_sample(self, request_id: str, sample: int) -> None: ...

    def generate(
        self, model: str, request: Request, *, times: RequestTimes | None = None
    ) -> AsyncGenerator[list[TokenDelta], None]: ...


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How tokens become text; the same for all choices of a request."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    offsets: bool = False  # whether each token's place in the text is wanted


class Piece(NamedTuple):
    """News of one choice. `offsets` are characters from the start of the choice's generated text."""

    choice: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] | None
    offsets: tuple[int, ...]
    finish_reason: str | None
    stop_reason: int | str | None


class Choice:
    """One sequence on its way to text."""

    __slots__ = ("_decoder", "_length", "_options", "_stops", "finish_reason", "index", "last_token_at", "num_tokens")

    def __init__(self, index: int, tokenizer: Tokenizer, options: OutputOptions) -> None:
        self.index = index
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.last_token_at = 0.0
        self._options = options
        self._decoder = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens)
        self._stops = StopStrings(options.stops, options.include_stop)
        self._length = 0  # characters decoded so far, shown or not

    def advance(self, delta: TokenDelta) -> Piece:
        """The piece that `delta` brings. Raises EngineError where the sequence failed."""
        if delta.finish_reason is FinishReason.ERROR:
            raise EngineError(delta.error or "the engine failed while it worked on this request")
        if self._options.stops or self._options.offsets:
            return self._advance_one_by_one(delta)
        self.num_tokens += len(delta.token_ids)
        text = self._decoder.feed(delta.token_ids[: self._num_visible(delta)])
        reason = None
        if delta.finish_reason is not None:
            text += self._decoder.finish()
            reason = self.finish_reason = delta.finish_reason.value
        return Piece(self.index, text, delta.token_ids, delta.logprobs, (), reason, delta.stop_reason)

    def _num_visible(self, delta: TokenDelta) -> int:
        """Tokens of the delta that become text: the one that stopped the sequence does not, unless asked for."""
        count = len(delta.token_ids)
        stopped = delta.finish_reason is FinishReason.STOP
        return count - 1 if stopped and count and not self._options.include_stop else count

    def _advance_one_by_one(self, delta: TokenDelta) -> Piece:
        shown: list[str] = []
        offsets: list[int] = []
        visible = self._num_visible(delta)
        for position, token_id in enumerate(delta.token_ids):
            offsets.append(self._length)
            self.num_tokens += 1
            if position < visible:
                stop = self._show(self._decoder.feed((token_id,)), shown)
                if stop is not None:
                    return self._piece(delta, position + 1, shown, offsets, "stop", stop)
        if delta.finish_reason is None:
            return self._piece(delta, len(delta.token_ids), shown, offsets, None, None)
        stop = self._show(self._decoder.finish(), shown)
        if stop is not None:
            return self._piece(delta, len(delta.token_ids), shown, offsets, "stop", stop)
        shown.append(self._stops.finish())
        reason = delta.finish_reason.value
        return self._piece(delta, len(delta.token_ids), shown, offsets, reason, delta.stop_reason)

    def _show(self, text: str, shown: list[str]) -> str | None:
        """Add what may be shown of new text; the stop string that it completes, if it does."""
        self._length += len(text)
        if self.num_tokens <= self._options.min_tokens:  # stop strings do not count before min_tokens
            shown.append(text)
            return None
        fed = self._stops.feed(text)
        shown.append(fed.text)
        return fed.stop

    def _piece(
        self,
        delta: TokenDelta,
        count: int,
        shown: list[str],
        offsets: list[int],
        reason: str | None,
        stop_reason: int | str | None,
    ) -> Piece:
        """The piece of the delta's first `count` tokens."""
        self.finish_reason = reason
        logprobs = delta.logprobs[:count] if delta.logprobs is not None else None
        text = "".join(shown)
        return Piece(self.index, text, delta.token_ids[:count], logprobs, tuple(offsets), reason, stop_reason)


class ResponseStream:
    """The choices of one HTTP request: `start()`, then iterate over lists of pieces, then `aclose()` in every case.

    `start` waits for the first tokens and raises what the engine has against the request (RequestError,
    CapacityError), while a status can still be sent. Iteration ends when every choice has its finish reason.
    """

    def __init__(
        self,
        source: TokenSource,
        model: str,
        requests: list[Request],
        tokenizer: Tokenizer,
        options: OutputOptions,
        intervals: Histogram,
    ) -> None:
        self.requests = requests
        self._source = source
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[tuple[Logprob | None, ...] | None] = [None] * len(requests)
        self.times = [RequestTimes() for _ in requests]
        self._intervals = intervals  # seconds between two tokens of a choice
        self._samples = requests[0].num_samples
        self.choices = [Choice(i, tokenizer, options) for i in range(len(requests) * self._samples)]
        self._num_open = len(self.choices)
        self._streams = [
            source.generate(model, request, times=times) for request, times in zip(requests, self.times, strict=True)
        ]
        self._merged = self._single() if len(requests) == 1 else self._many()
        self._iterator = self._pieces()
        self._first: list[Piece] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt_token_ids) for request in self.requests)

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    async def aclose(self) -> None:
        """Abort what still runs."""
        await self._merged.aclose()

    async def start(self) -> None:
        """Wait for the first tokens."""
        self._first = await anext(self._iterator, None)

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        async for pieces in self._iterator:
            yield pieces

    async def _pieces(self) -> AsyncGenerator[list[Piece], None]:
        clock = asyncio.get_running_loop().time
        while self._num_open:
            try:
                prompt, deltas = await anext(self._merged)
            except StopAsyncIteration:
                raise EngineError(f"{self._num_open} sequences ended without a finish reason") from None
            now = clock()
            pieces = [piece for delta in deltas if (piece := self._advance(prompt, delta, now)) is not None]
            if pieces:
                yield pieces

    def _advance(self, prompt: int, delta: TokenDelta, now: float) -> Piece | None:
        choice = self.choices[prompt * self._samples + delta.sample]
        if choice.finish_reason is not None:  # it ended at a stop string, and this was on its way
            return None
        if delta.num_cached_tokens and delta.sample == 0:
            self.num_cached_tokens += delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = delta.prompt_logprobs
        if choice.last_token_at:
            self._intervals.observe(now - choice.last_token_at)
        choice.last_token_at = now
        piece = choice.advance(delta)
        if choice.finish_reason is not None:
            self._num_open -= 1
            if delta.finish_reason is None:  # at a stop string: the engine does not detect those
                self._source.end_sample(self.requests[prompt].request_id, delta.sample)
        return piece

    async def _single(self) -> AsyncGenerator[tuple[int, list[TokenDelta]], None]:
        async with aclosing(self._streams[0]) as stream:
            async for deltas in stream:
                yield 0, deltas

    async def _many(self) -> AsyncGenerator[tuple[int, list[TokenDelta]], None]:
        """The streams of all prompts, in the order in which deltas arrive. The first error ends all."""
        arrived: asyncio.Queue[tuple[int, list[TokenDelta] | BaseException | None]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, stream, arrived)) for i, stream in enumerate(self._streams)]
        running = len(pumps)
        try:
            while running:
                prompt, news = await arrived.get()
                if isinstance(news, BaseException):
                    raise news
                if news is None:
                    running -= 1
                else:
                    yield prompt, news
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(prompt: int, stream: AsyncGenerator[list[TokenDelta], None], arrived: asyncio.Queue) -> None:
    """Carry one prompt's deltas to the queue they share; None at the end, or the error."""
    try:
        async with aclosing(stream):
            async for deltas in stream:
                arrived.put_nowait((prompt, deltas))
    except Exception as error:
        arrived.put_nowait((prompt, error))
    else:
        arrived.put_nowait((prompt, None))
