"""Log-probabilities in their three forms: completions, chat, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Sequence

from ...replicas.protocol import Logprob
from ...replicas.text.tokenizer import Tokenizer
from .answers import ChatLogprobs, CompletionLogprobs, PromptLogprob, PromptLogprobs, TokenLogprob, TopLogprob

# JSON has no infinity. vLLM writes this for a token of probability zero.
FLOOR = -9999.0


class TokenNames:
    """Names of tokens: their text, or "token_id:N", which is unique."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def raw(self, token_id: int) -> list[int]:
        """UTF-8 bytes, perhaps of an incomplete character."""
        return list(self._tokenizer.token_bytes(token_id))


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Logprob | None],
    offsets: Sequence[int],
    num_top: int,
    names: TokenNames,
) -> CompletionLogprobs:
    """The legacy form: parallel lists. The first token of an echoed prompt has no entry."""
    return CompletionLogprobs(
        text_offset=list(offsets),
        token_logprobs=[entry and _finite(entry.logprob) for entry in entries],
        tokens=[names.text(token_id) for token_id in token_ids],
        top_logprobs=[entry and _top_by_text(entry, num_top, names) for entry in entries],
    )


def _top_by_text(entry: Logprob, num_top: int, names: TokenNames) -> dict[str, float]:
    """The alternatives and the token itself. Of two tokens with equal text the more probable is kept."""
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        top.setdefault(names.text(token_id), _finite(logprob))
    return top


def chat_logprobs(entries: Sequence[Logprob], num_top: int, names: TokenNames) -> ChatLogprobs:
    """The chat form: one object per token."""
    return ChatLogprobs([_chat_token(entry, num_top, names) for entry in entries])


def _chat_token(entry: Logprob, num_top: int, names: TokenNames) -> TokenLogprob:
    top = [
        TopLogprob(names.text(token_id), _finite(logprob), names.raw(token_id))
        for token_id, logprob in entry.top[:num_top]
    ]
    return TokenLogprob(names.text(entry.token_id), _finite(entry.logprob), names.raw(entry.token_id), top)


def prompt_logprobs(entries: Sequence[Logprob | None], num_top: int, names: TokenNames) -> PromptLogprobs:
    """vLLM's form: the alternatives and the token itself, by token id; None for the first prompt token."""
    return [entry and _by_token_id(entry, num_top, names) for entry in entries]


def _by_token_id(entry: Logprob, num_top: int, names: TokenNames) -> dict[str, PromptLogprob]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)]
    return {
        str(token_id): PromptLogprob(_finite(logprob), rank, names.text(token_id)) for token_id, logprob, rank in ranked
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > FLOOR else FLOOR
