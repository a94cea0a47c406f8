"""The bodies that clients send: OpenAI's fields, and vLLM's where OpenAI has none.

Every bound is checked here, before a prompt is tokenised or anything is allocated. A null is the same as an absent
field. Types are strict: the string "5" is no number, though 5.0 is an integer, as in JSON Schema. Unknown fields are
errors, see `fields.py`. Lists fail at their first bad item: an error for each of a million would stop the event loop.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, WithJsonSchema, field_validator, model_validator

from .body_parsing import field_error

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKEN_LIST = 1024
MAX_MESSAGES = 4096

# Variables that a chat template may take from a request; all else in a template comes from the model's folder.
TEMPLATE_VARIABLES = frozenset({"date_string", "enable_thinking", "preserve_thinking", "thinking"})

TokenCount = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenIds = Annotated[list[TokenId], FailFast()]
Prompts = list[str] | list[list[int]]


def _text_or(*others: dict[str, Any]) -> WithJsonSchema:
    """For the published schema: a string or one of `others`, all of which a validator makes a list of."""
    return WithJsonSchema({"anyOf": [{"type": "string"}, *others]})


_TOKENS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXTS_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": {"type": "string"}}
_BATCH_SCHEMA = {"type": "array", "minItems": 1, "maxItems": MAX_PROMPTS, "items": _TOKENS_SCHEMA}
_STOPS_SCHEMA = {
    "type": "array",
    "maxItems": MAX_STOP_STRINGS,
    "items": {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS},
}


# Fields of the bodies below where 5.0 stands for 5.
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


def without_nulls(value: Any) -> Any:
    """An object without its null fields; anything else as it is."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", protected_namespaces=())

    model: str | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Literal[False] = False  # padding against observers of the traffic: there is none

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return without_nulls(value)


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
    stop: Annotated[list[StopString], _text_or(_STOPS_SCHEMA)] = Field([], max_length=MAX_STOP_STRINGS)
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
            raise field_error("stream_options", "needs stream: true")
        return self

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """The tokens asked for; None: as many as the context has room for."""

    @property
    def num_samples(self) -> int:
        """Sequences to generate for each prompt."""
        return self.n

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives wanted for each generated token; None: no log-probabilities at all."""


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[Prompts, _text_or(_TOKENS_SCHEMA, _TEXTS_SCHEMA, _BATCH_SCHEMA)]
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
            raise field_error("best_of", f"is {self.best_of}, less than n, which is {self.n}")
        if self.stream and self.num_samples > self.n:
            raise field_error("best_of", "greater than n cannot be streamed: the best is known only at the end")
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("prompt_logprobs", "cannot be streamed; use echo with logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise field_error("max_tokens", "is 0, which makes sense only with echo: true; give at least 1")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def num_samples(self) -> int:
        return self.best_of or self.n

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


class Message(BaseModel):
    """One message of a conversation. Content is text, whole or in parts."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, _text_or({"type": "array", "items": _PART_SCHEMA})] = ""
    name: str | None = None
    # A client sends answers back as it got them; these are null or empty there.
    refusal: None = None
    annotations: list[Any] = Field([], max_length=0)
    tool_calls: list[Any] = Field([], max_length=0)
    function_call: None = None
    audio: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    type: Literal["text", "message"] = "text"  # lm-evaluation-harness sends one

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return without_nulls(value)

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "\n".join([_text_of(part) for part in value])

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: none of them has a `developer`, which is OpenAI's later name of `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


def _text_of(part: Any) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise ValueError('may have parts of the form {"type": "text", "text": "..."} only: this server reads text')


class ChatFields(BaseModel):
    """What makes a prompt of messages; /tokenize takes the same."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, bool | int | str] = {}
    add_special_tokens: bool = False

    @field_validator("chat_template_kwargs", mode="before")
    @classmethod
    def _only_listed_variables(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value:
            if key not in TEMPLATE_VARIABLES:
                raise ValueError(f"{key[:40]!r} is not among {sorted(TEMPLATE_VARIABLES)}")
        return without_nulls(value)

    @model_validator(mode="after")
    def _prompt_or_continuation(self) -> ChatFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error("continue_final_message", "needs add_generation_prompt: false")
        return self


class ChatCompletionBody(ChatFields, GenerationBody):
    """POST /v1/chat/completions."""

    max_tokens: TokenCount | None = Field(None, ge=1)
    max_completion_tokens: TokenCount | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionBody:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "needs logprobs: true")
        if self.stream and self.prompt_logprobs is not None:
            raise field_error("prompt_logprobs", "cannot be streamed")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeTextBody(Body):
    """POST /tokenize with a prompt."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(ChatFields, Body):
    """POST /tokenize with messages."""

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
