"""The table of logits processors: which requests activate each, and what it needs of the engine.

The engine reads it without loading torch. Ranks make the processors (logits_processors.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from typing import Any, NamedTuple

from ..protocol import SamplingParams


class ProcessorSpec(NamedTuple):
    """One logits processor. `needs_last_token`: the host must have a row's last token before the row's next step."""

    load: Callable[[], Any]  # returns the class, a `ProcessorClass`
    is_active: Callable[[SamplingParams], bool]
    needs_last_token: bool = False


def needs_last_token(params: SamplingParams) -> bool:
    """Whether an active processor needs the last token; the sequence may then have one step in flight only."""
    return any(spec.needs_last_token and spec.is_active(params) for spec in LOGITS_PROCESSORS)


def _load(name: str) -> Callable[[], Any]:
    return partial(resolve_name, f"{__package__}.{name}")


# In the order in which they change a row's logits.
LOGITS_PROCESSORS: tuple[ProcessorSpec, ...] = (
    ProcessorSpec(_load("logits_processors:LogitBias"), lambda params: bool(params.logit_bias)),
    ProcessorSpec(_load("logits_processors:AllowedTokens"), lambda params: bool(params.allowed_token_ids)),
    ProcessorSpec(_load("logits_processors:BadWords"), lambda params: bool(params.bad_words)),
    ProcessorSpec(_load("logits_processors:MinTokens"), lambda params: params.min_tokens > 0),
    ProcessorSpec(_load("penalties:Penalties"), lambda params: params.has_penalties),
)
