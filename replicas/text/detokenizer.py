"""Incremental detokenisation and stop strings.

Both are pure functions of the token list, so a router can rebuild them from the tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# UTF-8 characters have at most four bytes. After so many tokens that end in a replacement
# character, the bytes are invalid, and waiting would only make later steps slower.
_MAX_PENDING_TOKENS = 8


class Detokenizer(Protocol):
    """Turns tokens into text incrementally; joined pieces equal decoding all tokens at once.

    The number of replacement characters may differ for invalid UTF-8.
    """

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that is certain, without incomplete characters."""
        ...

    def finish(self) -> str:
        """Return the rest, with replacement characters for incomplete ones."""
        ...


class ByteDetokenizer:
    """Exact UTF-8 decoding for byte-level vocabularies.

    `tokenizers.decoders.DecodeStream` cannot be flushed inside a character, and decodes its
    window again for every token. This is a table look-up.
    """

    __slots__ = ("_bytes", "_decoder")

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_ids: Sequence[int]) -> str:
        table = self._bytes
        try:
            raw = b"".join([table[i] for i in token_ids])
        except IndexError:  # a model's vocabulary may be padded beyond its tokenizer's
            raw = b"".join([table[i] for i in token_ids if i < len(table)])
        return self._decoder.decode(raw)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For other vocabularies: decodes a short window and returns the newest tokens' text."""

    __slots__ = ("_decode", "_emitted", "_ids", "_read")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the window: emitted context tokens, then new ones
        self._read = 0  # emitted tokens of the window
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
            if self._emitted and text == self._emitted:  # a skipped special token: the window need not grow
                self._ids.pop()
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        self._emitted = self._decode(self._ids)
        return new


class Fed(NamedTuple):
    """The text to emit, and the stop string that ended the sequence."""

    text: str
    stop: str | None


@dataclass(slots=True)
class StopStrings:
    """Finds stop strings in incremental text, however it is cut.

    Keeps back text that may begin a stop string. The first complete match wins; of several that
    end together, the longest.
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
        text, self._held = self._held, ""
        return text

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [(start + len(stop), start, stop) for stop in self.stops if (start := text.find(stop)) >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max(map(len, self.stops)) - 1
        for keep in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-keep:]) for stop in self.stops):
                return keep
        return 0
