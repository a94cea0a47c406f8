"""Log-probabilities in the three forms that clients know: completions, chat, and vLLM's of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...replicas.protocol import Logprob
from ...replicas.text.tokenizer import Tokenizer

# JSON has no infinity. vLLM writes this for a token that has probability zero.
FLOOR = -9999.0


class TokenNames:
    """How tokens are shown: as text, or as "token_id:N", which tells tokens of equal text apart."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)

    def raw(self, token_id: int) -> list[int]:
        """UTF-8 bytes; those of an incomplete character too."""
        return list(self._tokenizer.token_bytes(token_id))


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Logprob | None],
    offsets: Sequence[int],
    num_top: int,
    names: TokenNames,
) -> dict[str, Any]:
    """The legacy form: parallel lists. The first token of an echoed prompt has no entry."""
    return {
        "text_offset": list(offsets),
        "token_logprobs": [entry and _finite(entry.logprob) for entry in entries],
        "tokens": [names.text(token_id) for token_id in token_ids],
        "top_logprobs": [entry and _top_by_text(entry, num_top, names) for entry in entries],
    }


def _top_by_text(entry: Logprob, num_top: int, names: TokenNames) -> dict[str, float]:
    """The alternatives and the token itself. Where two tokens have one text, the likelier stands."""
    top: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        top.setdefault(names.text(token_id), _finite(logprob))
    return top


def chat_logprobs(entries: Sequence[Logprob], num_top: int, names: TokenNames) -> dict[str, Any]:
    """The chat form: one object for each token."""
    return {
        "content": [
            {
                **_chat_token(entry.token_id, entry.logprob, names),
                "top_logprobs": [_chat_token(token_id, logprob, names) for token_id, logprob in entry.top[:num_top]],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def _chat_token(token_id: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.text(token_id), "logprob": _finite(logprob), "bytes": names.raw(token_id)}


def prompt_logprobs(
    entries: Sequence[Logprob | None], num_top: int, names: TokenNames
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form: for each prompt token the alternatives and itself, by token id; None for the first."""
    return [entry and _by_token_id(entry, num_top, names) for entry in entries]


def _by_token_id(entry: Logprob, num_top: int, names: TokenNames) -> dict[str, dict[str, Any]]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top[:num_top], 1)]
    return {
        str(token_id): {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.text(token_id)}
        for token_id, logprob, rank in ranked
    }


def _finite(logprob: float) -> float:
    return logprob if logprob > FLOOR else FLOOR
