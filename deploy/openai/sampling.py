"""Builds the engine's Request from a validated body and a tokenised prompt."""

from __future__ import annotations

import secrets
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...replicas.engine.request_limits import ModelLimits
from ...replicas.protocol import SEED_BITS, Request, SamplingParams
from .schema import GenerationBody

if TYPE_CHECKING:
    from ...replicas.text.tokenizer import Tokenizer

# Below this, the division of logits by the temperature loses precision in float32; vLLM has the same floor.
MIN_TEMPERATURE = 0.01
_CONVERTED = frozenset(
    {"max_tokens", "temperature", "top_k", "logit_bias", "bad_words", "seed", "logprobs", "prompt_logprobs"}
)
# Sampling parameters with the same name and meaning in a body: a new one is copied without a line here.
_COPIED = tuple(
    field.name
    for field in fields(SamplingParams)
    if field.name in GenerationBody.model_fields and field.name not in _CONVERTED
)


def build_request(
    body: GenerationBody, prompt: list[int], *, request_id: str, limits: ModelLimits, tokenizer: Tokenizer
) -> Request:
    """The engine's request for one prompt of `body`. Raises RequestError or PromptTooLong, with the numbers."""
    prompt = _truncate(prompt, body.truncate_prompt_tokens, limits.max_model_len)
    # max_tokens 0 (echo alone) runs one token that is not shown.
    wanted = None if body.limit is None else max(body.limit, 1)
    remaining = limits.check_context(len(prompt), wanted)
    max_tokens = wanted or min(remaining, body.default_max_tokens or remaining)
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=_sampling(body, max_tokens, tokenizer),
        num_samples=body.num_samples,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    limits.check_model(request)
    return request


def _truncate(prompt: list[int], keep: int | None, max_model_len: int) -> list[int]:
    """The last `keep` tokens, as in vLLM; -1 keeps as many as the context holds beside one new token."""
    if keep is None:
        return prompt
    if keep == -1:
        keep = max_model_len - 1
    return prompt[max(0, len(prompt) - keep) :]


def _sampling(body: GenerationBody, max_tokens: int, tokenizer: Tokenizer) -> SamplingParams:
    copied = {name: _frozen(getattr(body, name)) for name in _COPIED}
    logprobs = body.num_logprobs
    if logprobs is None and body.num_samples > body.n:
        logprobs = 0  # best_of ranks samples by them
    seed = body.seed if body.seed is not None else secrets.randbits(SEED_BITS)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=max(body.temperature, MIN_TEMPERATURE) if body.temperature > 0 else 0.0,
        top_k=max(body.top_k, 0),
        logit_bias=tuple((int(key), value) for key, value in body.logit_bias.items()),
        bad_words=tuple(ids for word in body.bad_words for ids in _spellings(word, tokenizer)),
        seed=seed % (1 << SEED_BITS),
        logprobs=logprobs,
        prompt_logprobs=body.num_prompt_logprobs,
        **copied,
    )


def _frozen(value: Any) -> Any:
    """A list of ids as a tuple without duplicates; any other value unchanged."""
    return tuple(dict.fromkeys(value)) if isinstance(value, list) else value


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the start of a text and after a space, where the two differ."""
    plain = tuple(tokenizer.encode(word.lstrip() or word, add_special_tokens=False))
    spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
    return [ids for ids in dict.fromkeys((plain, spaced)) if ids]
