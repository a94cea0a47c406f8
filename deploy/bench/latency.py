"""Decode time a step and prefill rate, by batch and context.

All sequences start together. Decode is (time of N + 1 new tokens - time of one)

N, so that prefill and fixed costs cancel. Prefill is all prompt tokens over the time of one new
token. The fastest round counts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from .limits import Dense, Rates
from .workload import Run, fixed_lengths

NUM_DECODED = 128


@dataclass(slots=True)
class Timing:
    """The times of one row, over its rounds."""

    batch: int
    context: int
    num_decoded: int = NUM_DECODED
    first_s: list[float] = field(default_factory=list)
    all_s: list[float] = field(default_factory=list)

    def add_round(self, run: Run, draw: random.Random, vocab_size: int) -> None:
        """Time the row once more, with new prompts."""
        for num_new_tokens, times in ((1, self.first_s), (self.num_decoded + 1, self.all_s)):
            times.append(run(fixed_lengths(draw, self.batch, self.context, num_new_tokens, vocab_size)))

    @property
    def decode_s(self) -> float:
        """Seconds of one decode step."""
        return (min(self.all_s) - min(self.first_s)) / self.num_decoded

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.batch * self.context / min(self.first_s)

    def decode_limit_s(self, model: Dense, rates: Rates) -> float:
        """The lower bound of a step at the mean timed context."""
        return model.decode_s(self.batch, self.context + (self.num_decoded + 1) / 2, rates)

    def prefill_limit(self, model: Dense, rates: Rates) -> float:
        """The upper bound of prompt tokens a second."""
        return self.context / model.prefill_s(self.context, rates)


def row(timing: Timing, model: Dense | None, rates: Rates) -> dict[str, Any]:
    """A row of the report; without limits if the model's are unknown."""
    values = {
        "batch": timing.batch,
        "context": timing.context,
        "decode ms": timing.decode_s * 1e3,
        "tok/s": timing.batch / timing.decode_s,
        "prefill tok/s": timing.prefill_rate,
    }
    if model is None:
        return values
    limit = timing.decode_limit_s(model, rates)
    return values | {
        "limit ms": limit * 1e3,
        "of limit": limit / timing.decode_s,
        "prefill of limit": timing.prefill_rate / timing.prefill_limit(model, rates),
    }


def warm_up(run: Run, draw: random.Random, vocab_size: int) -> None:
    """Run four short sequences, which loads whatever is loaded lazily."""
    run(fixed_lengths(draw, 4, 128, 8, vocab_size))
