"""The JSON answers of the API: OpenAI's fields, and vLLM's where OpenAI has none.

A field whose default is UNSET is absent unless it is set; a None is written as null.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

encode_json: Callable[[object], bytes] = msgspec.json.Encoder().encode


class PromptTokensDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


# Absent where no usage was requested, null where only the last chunk of a stream has it.
OptionalUsage = Usage | None | UnsetType


class PromptLogprob(Struct):
    """One candidate of vLLM's prompt_logprobs."""

    logprob: float
    rank: int
    decoded_token: str


# One entry per prompt token, keyed by token id; null for the first token.
PromptLogprobs = list[dict[str, PromptLogprob] | None]


# ---- /v1/completions


class CompletionLogprobs(Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType | None = UNSET


class Completion(Struct):
    """A whole answer, and a chunk of a stream."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OptionalUsage = UNSET
    object: Literal["text_completion"] = "text_completion"


# ---- /v1/chat/completions


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(Struct):
    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: OptionalUsage = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


# ---- models, tokens, operations


class ModelCard(Struct):
    id: str
    created: int
    root: str
    max_model_len: int | None
    object: Literal["model"] = "model"
    owned_by: str = "shoal"
    parent: None = None


class ModelList(Struct):
    data: list[ModelCard]
    object: Literal["list"] = "list"


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(Struct):
    prompt: str


class Version(Struct):
    version: str


class Health(Struct):
    status: Literal["ok"] = "ok"


# By model: of each replica its id, its block counts, and those of its requests.
BlockReports = dict[str, list[dict[str, Any]]]
# The fields of tokenizer_config.json, and chat_template.
TokenizerInfo = dict[str, Any]
# By model: whether every replica has reset its cache.
CacheResets = dict[str, bool]


class ErrorDetail(Struct, forbid_unknown_fields=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Struct, forbid_unknown_fields=True):
    error: ErrorDetail
