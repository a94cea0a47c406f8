"""The limits that a request must meet, checked before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import get_type_hints

from ..errors import PromptTooLong, RequestError
from ..protocol import Bounds, Request, SamplingParams

_BOUNDS: tuple[tuple[str, Bounds], ...] = tuple(
    (name, bounds)
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items()
    for bounds in getattr(hint, "__metadata__", ())
    if isinstance(bounds, Bounds)
)


def check_token_ids(token_ids: Collection[int], vocab_size: int, param: str) -> None:
    """Raise RequestError that names `param` if an id is outside the vocabulary."""
    if not token_ids:
        return
    for token in (min(token_ids), max(token_ids)):
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{param} has token id {token}, outside the vocabulary 0..{vocab_size - 1}",
                param=param,
                code="invalid_token_id",
            )


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """A model's limits in tokens, checked by the HTTP layer and the engine. Pure; any thread may call."""

    vocab_size: int
    max_model_len: int

    def check_model(self, request: Request) -> None:
        """Raise RequestError, with the numbers, if no engine with this model could serve the request."""
        sampling = request.sampling
        self._check_prompt(request)
        self._check_ids(sampling)
        self._check_ranges(sampling)
        self.check_context(len(request.prompt_token_ids), sampling.max_tokens)

    def check_context(self, prompt_len: int, max_tokens: int | None) -> int:
        """The tokens that the context leaves. Raise PromptTooLong if fewer than `max_tokens` (None: one)."""
        remaining = self.max_model_len - prompt_len
        if remaining < 1:
            raise PromptTooLong(
                f"the prompt has {prompt_len} tokens and the model's context is {self.max_model_len}, which leaves "
                f"none for an answer; shorten the prompt to at most {self.max_model_len - 1} tokens"
            )
        if max_tokens is not None and max_tokens > remaining:
            raise PromptTooLong(
                f"the prompt has {prompt_len} tokens and max_tokens is {max_tokens}: {prompt_len + max_tokens} "
                f"together, but the model's context is {self.max_model_len}; shorten the prompt or lower max_tokens "
                f"to {remaining}"
            )
        return remaining

    def _check_prompt(self, request: Request) -> None:
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty; send at least one token", param="prompt", code="empty_prompt")
        check_token_ids(request.prompt_token_ids, self.vocab_size, "prompt")

    def _check_ids(self, sampling: SamplingParams) -> None:
        check_token_ids(sampling.stop_token_ids, self.vocab_size, "stop_token_ids")
        check_token_ids(sampling.allowed_token_ids, self.vocab_size, "allowed_token_ids")
        check_token_ids([token for token, _ in sampling.logit_bias], self.vocab_size, "logit_bias")
        check_token_ids([token for word in sampling.bad_words for token in word], self.vocab_size, "bad_words")

    def _check_ranges(self, sampling: SamplingParams) -> None:
        ranges = (
            ("max_tokens", sampling.max_tokens, 1, math.inf),
            ("min_tokens", sampling.min_tokens, 0, sampling.max_tokens),
            *((name, getattr(sampling, name), *bounds) for name, bounds in _BOUNDS),
            ("logprobs", sampling.logprobs or 0, 0, self.vocab_size),
            ("prompt_logprobs", sampling.prompt_logprobs or 0, 0, self.vocab_size),
        )
        for param, value, low, high in ranges:
            if not low <= value <= high:  # also refuses NaN
                raise RequestError(f"{param} is {value}; it must be from {low} to {high}", param=param)
        if sampling.top_p == 0.0:
            raise RequestError("top_p is 0.0; it must be above 0", param="top_p")
        if not all(sampling.bad_words):
            raise RequestError("bad_words has a word without tokens; leave it out", param="bad_words")
        if any(not math.isfinite(bias) for _, bias in sampling.logit_bias):
            raise RequestError("logit_bias has a value that is not finite", param="logit_bias")


@dataclass(frozen=True, slots=True)
class RequestLimits(ModelLimits):
    """The limits of one engine: those of its model, its batch and its KV blocks."""

    max_num_seqs: int
    num_blocks: int
    block_size: int

    def check(self, request: Request) -> None:
        """Raise RequestError, with the numbers, if this engine could never serve the request."""
        self.check_model(request)
        self._check_emitted(request)
        self._check_samples(request)

    def _check_emitted(self, request: Request) -> None:
        num_emitted, max_tokens = len(request.emitted_token_ids), request.sampling.max_tokens
        check_token_ids(request.emitted_token_ids, self.vocab_size, "emitted_token_ids")
        if num_emitted >= max_tokens:
            raise RequestError(
                f"{num_emitted} tokens were emitted already and max_tokens is {max_tokens}: nothing is left to do",
                param="emitted_token_ids",
            )

    def _check_samples(self, request: Request) -> None:
        n = request.num_samples
        if not 1 <= n <= self.max_num_seqs:
            raise RequestError(
                f"n is {n}; this engine runs from 1 to {self.max_num_seqs} sequences at once (max_num_seqs)", param="n"
            )
        if request.emitted_token_ids and n != 1:
            raise RequestError(f"a resumed request has one sample, not {n}", param="n")
        prompt_len, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        shared = prompt_len // self.block_size
        own = -(-(prompt_len + max_tokens - 1) // self.block_size) - shared  # the last token is never run
        if shared + n * own > self.num_blocks:
            raise RequestError(
                f"a prompt of {prompt_len} tokens with n = {n} and max_tokens = {max_tokens} needs {shared + n * own} "
                f"KV blocks of {self.block_size} tokens, and the engine has {self.num_blocks}; lower n or max_tokens",
                param="max_tokens",
                code="kv_capacity_exceeded",
            )
