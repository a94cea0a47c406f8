"""Text out of tokens, one token at a time: incremental detokenisation and stop strings.

Both are pure functions of the token list, so that a router can rebuild them by feeding the tokens again.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A UTF-8 character has at most four bytes: where so many tokens in a row end in a replacement character, the bytes are
# wrong and will not become right, and waiting longer would make every further step dearer.
_MAX_PENDING_TOKENS = 8


class Detokenizer(Protocol):
    """Turns tokens into text as they come. The pieces joined are what decoding all tokens at once gives.

    Of bytes that are no UTF-8 it may show more or fewer replacement characters.
    """

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now; characters whose last bytes are missing are kept back."""
        ...

    def finish(self) -> str:
        """The rest; incomplete characters become replacement characters."""
        ...


class ByteDetokenizer:
    """For byte-level vocabularies: every token is a run of bytes, so text is their UTF-8 decoding, exactly.

    `tokenizers.decoders.DecodeStream` gives the same text, but it cannot be flushed when a sequence ends inside a
    character, and decodes its window again for every token; this is one table look-up.
    """

    __slots__ = ("_bytes", "_decoder")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        table = self._bytes
        try:
            raw = b"".join([table[i] for i in token_ids])
        except IndexError:  # a model's vocabulary may be padded beyond its tokenizer's; such tokens have no text
            raw = b"".join([table[i] for i in token_ids if i < len(table)])
        return self._decoder.decode(raw)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other vocabulary: decodes a short window of tokens and gives what the newest ones add to it."""

    __slots__ = ("_decode", "_emitted", "_ids", "_read")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window: tokens already given out that the new ones lean on, then the new ones
        self._read = 0  # tokens of the window that are given out
        self._emitted = ""  # their text

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._step(token_id) for token_id in token_ids])

    def finish(self) -> str:
        text = self._decode(self._ids)[len(self._emitted) :]
        self._ids, self._read, self._emitted = [], 0, ""
        return text

    def _step(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        pending = len(self._ids) - self._read
        if text.endswith(REPLACEMENT) and pending < _MAX_PENDING_TOKENS:
            return ""
        new = text[len(self._emitted) :]
        if not new:
            if self._emitted and text == self._emitted:  # a special token that is skipped: the window need not grow
                self._ids.pop()
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._emitted = self._decode(self._ids)
        return new


class Fed(NamedTuple):
    """What came of a piece of text: what may be shown, and the stop string that ended the sequence."""

    text: str
    stop: str | None


@dataclass(slots=True)
class StopStrings:
    """Finds stop strings in a text that arrives in pieces.

    The end of the text that may be the beginning of a stop string is kept back until it is known. The match that is
    complete first wins; of several that end together, the longest. The result does not depend on how the text was cut.
    """

    stops: tuple[str, ...]
    include_in_output: bool = False
    _held: str = ""

    def feed(self, text: str) -> Fed:
        if not self.stops:
            return Fed(text, None)
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            start, stop = found
            self._held = ""
            return Fed(text[: start + len(stop)] if self.include_in_output else text[:start], stop)
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return Fed(text[: len(text) - keep], None)

    def finish(self) -> str:
        """What was kept back, when no more text will come."""
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _undecided(self, text: str) -> int:
        """Characters at the end of `text` that are the beginning of a stop string."""
        longest = max(map(len, self.stops)) - 1
        for keep in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-keep:]) for stop in self.stops):
                return keep
        return 0
