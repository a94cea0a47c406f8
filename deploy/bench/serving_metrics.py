"""From the times of streams to latencies, rates and goodput, in milliseconds unless stated."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .http_client import Answer

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Limits for goodput, in milliseconds; None: no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met(self, ttft: np.ndarray, tpot: np.ndarray, e2e: np.ndarray) -> np.ndarray:
        """Whether each request met all limits."""
        kept = np.ones(len(ttft), bool)
        for wanted, seen in ((self.ttft, ttft), (self.tpot, tpot), (self.e2e, e2e)):
            if wanted is not None:
                kept &= seen <= wanted
        return kept


NO_OBJECTIVES = Objectives()


def poisson_offsets(rate: float, num_requests: int, seed: int = 0) -> list[float]:
    """Arrival times in seconds of a Poisson process of `rate` a second, the first at 0."""
    draw, offsets = random.Random(seed), [0.0]
    while len(offsets) < num_requests:
        offsets.append(offsets[-1] + draw.expovariate(rate))
    return offsets[:num_requests]


def figures(answers: Sequence[Answer], objectives: Objectives = NO_OBJECTIVES) -> dict[str, Any]:
    """One row of a report.

    TTFT: from a request's due time to its first event. ITL: between two events of a stream.
    TPOT: from first to last event, over all tokens but the first. E2E: from due time to last
    event. Rates span the first due time to the last event of any; goodput counts requests that
    met `objectives`.
    """
    whole = [answer for answer in answers if answer.error is None and answer.event_times]
    row: dict[str, Any] = {"requests": len(answers), "failed": len(answers) - len(whole)}
    if not whole:
        return row
    due = np.array([answer.due for answer in whole])
    first = np.array([answer.event_times[0] for answer in whole])
    last = np.array([answer.event_times[-1] for answer in whole])
    tokens = np.array([answer.num_tokens for answer in whole])
    seconds = float(last.max() - min(answer.due for answer in answers))
    ttft, e2e = (first - due) * 1e3, (last - due) * 1e3
    tpot = (last - first) * 1e3 / np.maximum(tokens - 1, 1)
    itl = np.concatenate([np.diff(answer.event_times) for answer in whole]) * 1e3
    row |= {
        "seconds": seconds,
        "req/s": len(whole) / seconds,
        "output tok/s": float(tokens.sum()) / seconds,
        "goodput req/s": int(objectives.met(ttft, tpot, e2e).sum()) / seconds,
    }
    for name, values in (("TTFT", ttft), ("TPOT", tpot), ("ITL", itl), ("E2E", e2e)):
        row |= {f"{name} p{share}": percentile(values, share) for share in _PERCENTILES}
    return row


def percentile(values: np.ndarray, share: float) -> float | None:
    """Linear between the two nearest values; None of no values (a one-token stream has no ITL)."""
    return float(np.percentile(values, share)) if len(values) else None
