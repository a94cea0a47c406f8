"""The bodies that hold messages: chat completions, and /tokenize of messages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Body as JsonBody
from pydantic import Field, WrapValidator, field_validator, model_validator

from ...replicas.errors import RequestError
from .schema import MAX_LOGPROBS, GenerationBody, TokenCount, TokenizeTextBody
from .schema_base import Body, JsonObject, text_or, without_nulls

MAX_MESSAGES = 4096
# Variables that a chat template accepts from a request; all others come from the model's folder.
TEMPLATE_VARIABLES = frozenset({"date_string", "enable_thinking", "preserve_thinking", "thinking"})

_PART_SCHEMA = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}


class Message(JsonObject):
    """One message of a conversation. Content is text, whole or in parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, text_or({"type": "array", "items": _PART_SCHEMA})] = ""
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


class ChatFields(Body):
    """What makes a prompt of messages; /tokenize takes the same."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, bool | int | str] = Field({})
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
            raise RequestError(
                "continue_final_message needs add_generation_prompt: false", param="continue_final_message"
            )
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
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeChatBody(ChatFields):
    """POST /tokenize with messages."""

    return_token_strs: bool = False


def _text_or_chat(value: Any, _: Any) -> TokenizeTextBody | TokenizeChatBody:
    """Validate as the kind that the body's fields show, so that errors are of one kind."""
    has_messages = isinstance(value, dict) and value.get("messages") is not None
    return (TokenizeChatBody if has_messages else TokenizeTextBody).model_validate(value)


TokenizeBody = Annotated[TokenizeTextBody | TokenizeChatBody, WrapValidator(_text_or_chat), JsonBody()]
