"""From a validated body and a tokenised prompt to the engine's own Request."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...replicas.errors import PromptTooLong, RequestError
from ...replicas.protocol import SEED_BITS, Request, SamplingParams
from .schema import CompletionBody, GenerationBody

if TYPE_CHECKING:
    from ...replicas.text.tokenizer import Tokenizer

# Below this the division of logits by the temperature loses itself in float32; vLLM has the same floor.
MIN_TEMPERATURE = 0.01
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What requests for one model are held against. Tokens."""

    max_model_len: int
    vocab_size: int


def build_request(
    body: GenerationBody, prompt: list[int], *, request_id: str, limits: ModelLimits, tokenizer: Tokenizer
) -> Request:
    """The engine's request for one prompt of `body`. Raises RequestError or PromptTooLong, with the numbers."""
    prompt = _truncate(prompt, body.truncate_prompt_tokens, limits.max_model_len)
    if not prompt:
        raise RequestError("the prompt is empty: it has no token", param="prompt")
    worst = max(prompt)
    if worst >= limits.vocab_size or min(prompt) < 0:
        wrong = worst if worst >= limits.vocab_size else min(prompt)
        raise RequestError(f"token id {wrong} is outside the vocabulary 0..{limits.vocab_size - 1}", param="prompt")
    max_tokens = _max_tokens(body, len(prompt), limits.max_model_len)
    if body.min_tokens > max_tokens:
        raise RequestError(
            f"min_tokens is {body.min_tokens}, more than the {max_tokens} tokens that may be generated",
            param="min_tokens",
        )
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=_sampling(body, max_tokens, limits.vocab_size, tokenizer),
        num_samples=body.num_samples,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )


def _truncate(prompt: list[int], keep: int | None, max_model_len: int) -> list[int]:
    """The last `keep` tokens, as vLLM does; -1 keeps what the context has room for beside one new token."""
    if keep is None:
        return prompt
    if keep == -1:
        keep = max_model_len - 1
    return prompt[max(0, len(prompt) - keep) :]


def _max_tokens(body: GenerationBody, prompt_len: int, max_model_len: int) -> int:
    room = max_model_len - prompt_len
    if body.limit is None:
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {prompt_len} tokens and the model's context is {max_model_len}, which leaves no room "
                "for an answer; shorten the prompt"
            )
        return min(room, DEFAULT_COMPLETION_TOKENS) if isinstance(body, CompletionBody) else room
    wanted = max(body.limit, 1)  # max_tokens 0 (echo alone) runs one token that is not shown
    if wanted > room:
        raise PromptTooLong(
            f"the prompt has {prompt_len} tokens and {wanted} more are asked for, {prompt_len + wanted} in all; the "
            f"model's context is {max_model_len}; shorten the prompt or ask for at most {max(room, 0)}"
        )
    return wanted


def _sampling(body: GenerationBody, max_tokens: int, vocab_size: int, tokenizer: Tokenizer) -> SamplingParams:
    temperature = max(body.temperature, MIN_TEMPERATURE) if body.temperature > 0 else 0.0
    logprobs = body.num_logprobs
    if logprobs is None and body.num_samples > body.n:
        logprobs = 0  # the best are chosen by them
    prompt_logprobs = body.prompt_logprobs
    if isinstance(body, CompletionBody) and body.echo and body.logprobs is not None:
        prompt_logprobs = max(body.logprobs, prompt_logprobs or 0)
    seed = body.seed if body.seed is not None else secrets.randbits(SEED_BITS)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=tuple((_in_vocab(int(key), vocab_size, "logit_bias"), v) for key, v in body.logit_bias.items()),
        allowed_token_ids=_all_in_vocab(body.allowed_token_ids, vocab_size, "allowed_token_ids"),
        bad_words=tuple(ids for word in body.bad_words for ids in _spellings(word, tokenizer)),
        seed=seed % (1 << SEED_BITS),
        stop_token_ids=_all_in_vocab(body.stop_token_ids, vocab_size, "stop_token_ids"),
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _in_vocab(token_id: int, vocab_size: int, param: str) -> int:
    if token_id >= vocab_size:
        raise RequestError(f"{param}: token id {token_id} is outside the vocabulary 0..{vocab_size - 1}", param=param)
    return token_id


def _all_in_vocab(token_ids: list[int], vocab_size: int, param: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_in_vocab(token_id, vocab_size, param) for token_id in token_ids))


def _spellings(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """A word's tokens at the start of a text and after a space, where the two differ."""
    plain = tuple(tokenizer.encode(word.lstrip() or word, add_special_tokens=False))
    spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
    return [ids for ids in dict.fromkeys((plain, spaced)) if ids]
