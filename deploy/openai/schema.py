"""The bodies of completions and of what they share with chat: OpenAI's fields, and vLLM's where OpenAI has none.

Every bound is checked here, before a prompt is tokenised or anything is allocated. Types are strict: the string "5" is
not a number, though 5.0 is an integer, as in JSON Schema. Lists fail at their first bad item: findings for each of a
million would block the event loop.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, field_validator, model_validator

from ...replicas.errors import RequestError
from .schema_base import Body, JsonObject, text_or

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, of /v1/completions
MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKEN_LIST = 1024

TokenCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[TokenId], FailFast()]
Prompts = list[str] | list[list[int]]


_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXTS_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}}
_BATCH_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKENS_SCHEMA}
_STOPS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_STOP_STRINGS,
    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
}


# Fields where 5.0 is accepted as 5.
_INTEGERS = (
    "n",
    "best_of",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "top_k",
    "seed",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "truncate_prompt_tokens",
    "priority",
)


class StreamOptions(JsonObject):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False  # padding that hides text lengths: not available


class GenerationBody(Body):
    """What completions and chat completions share."""

    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: Number = Field(1.0, ge=0.0, le=100.0)
    top_p: Number = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=-1, le=2**31 - 1)
    min_p: Number = Field(0.0, ge=0.0, le=1.0)
    presence_penalty: Number = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: Number = Field(0.0, ge=-2.0, le=2.0)
    repetition_penalty: Number = Field(1.0, gt=0.0, le=100.0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logit_bias: dict[str, Annotated[Number, Field(ge=-100.0, le=100.0)]] = Field({}, max_length=MAX_LOGIT_BIAS)
    allowed_token_ids: TokenIds = Field([], min_length=1)
    bad_words: list[StopString] = Field([], max_length=MAX_TOKEN_LIST)
    min_tokens: TokenCount = 0
    ignore_eos: bool = False
    stop: Annotated[list[StopString], text_or(_STOPS_SCHEMA)] = Field([], max_length=MAX_STOP_STRINGS)
    stop_token_ids: TokenIds = Field([], max_length=MAX_TOKEN_LIST)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=2**31 - 1)
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field("", max_length=256)
    user: str | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator(*_INTEGERS, mode="before", check_fields=False)
    @classmethod
    def _whole_floats_are_integers(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _keys_are_token_ids(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"has {len(value)} entries; the limit is {MAX_LOGIT_BIAS}")
        for key in value:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise ValueError(f"key {key[:40]!r} is not a token id")
        return value

    @model_validator(mode="after")
    def _stream_options_belong_to_streams(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", param="stream_options")
        return self

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """The most tokens to generate; None: `default_max_tokens`."""

    @property
    def default_max_tokens(self) -> int | None:
        """The tokens of a request without a limit; None: as many as the context leaves."""
        return None

    @property
    def num_samples(self) -> int:
        """Sequences to generate for each prompt."""
        return self.n

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives for each generated token; None: no log-probabilities at all."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives for each prompt token; None: no log-probabilities at all."""
        return self.prompt_logprobs


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[Prompts, text_or(_TOKENS_SCHEMA, _TEXTS_SCHEMA, _BATCH_SCHEMA)]
    max_tokens: TokenCount | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt_is_a_list(cls, value: Any) -> Any:
        return prompt_list(value)

    @model_validator(mode="after")
    def _fields_agree(self) -> CompletionBody:
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of is {self.best_of}, less than n, which is {self.n}", param="best_of")
        if self.stream and self.num_samples > self.n:
            raise RequestError(
                "best_of greater than n cannot be streamed: the best is known only at the end", param="best_of"
            )
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed; use echo with logprobs", param="prompt_logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError(
                "max_tokens is 0, which makes sense only with echo: true; give at least 1", param="max_tokens"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def default_max_tokens(self) -> int:
        return DEFAULT_COMPLETION_TOKENS

    @property
    def num_samples(self) -> int:
        return self.best_of or self.n

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        if self.echo and self.logprobs is not None:
            return max(self.logprobs, self.prompt_logprobs or 0)
        return self.prompt_logprobs


class TokenizeTextBody(Body):
    """POST /tokenize with a prompt."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: TokenIds = Field(max_length=1 << 20)
    skip_special_tokens: bool = False


def prompt_list(value: Any) -> Prompts:
    """The four forms of a prompt (text, tokens, or a list of either) as a list of one kind.

    Written by hand: a union of lists would be tried form by form over what may be a million integers.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not value:
        raise ValueError("must not be an empty list")
    kinds = set(map(type, value))  # no Python step for each of what may be a million integers
    if kinds == {int}:
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"has {len(value)} prompts; the limit is {MAX_PROMPTS}")
    if kinds == {str} or (kinds == {list} and all(set(map(type, item)) <= {int} for item in value)):
        return value
    raise ValueError("mixes kinds: every item must be a string, or every one a list of token ids, or every one an id")
