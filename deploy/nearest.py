"""Hints that name the nearest known spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_CHARS = 64  # difflib takes quadratic time, and names come from clients


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'stream'?"` for the nearest of `known`; an empty string if none is near."""
    matches = difflib.get_close_matches(name[:_MAX_CHARS], list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
