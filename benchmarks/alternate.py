"""Rows of a comparison, measured in turn: first one subject, then the other, then both again.

A later turn that does not fit the remaining time is left out; first turns always run. Of times the fastest
turn counts, of rates the median.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol, TypeVar

from shoal.deploy.bench import serving
from shoal.deploy.bench.http_client import Target
from shoal.deploy.bench.latency import NUM_DECODED, Timing
from shoal.deploy.bench.limits import Dense, Rates
from shoal.deploy.bench.workload import Run, Workload

OURS, PEER = "shoal", "vllm"
Pair = tuple[str, str]  # names of two subjects; a ratio above 1 says that the first is better

Subject = TypeVar("Subject", contravariant=True)
# Least ratio of a row to pass, and the ratio aimed at.
Goals = Mapping[str, tuple[float, float]]


class Row(Protocol[Subject]):
    """One measurement, taken of both subjects."""

    def measure(self, name: str, subject: Subject, turn: int) -> None:
        """Measure once more; the same `turn` gives both the same work."""
        ...

    def figures(self, pair: Pair = (OURS, PEER)) -> Iterator[Figure]: ...


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a pair; `limit` is the device's best."""

    what: str
    unit: str
    values: Sequence[float | None]
    lower_is_better: bool
    limit: float | None = None
    pair: Pair = (OURS, PEER)

    def row(self, goals: Goals) -> dict[str, Any]:
        """A report row. The ratio is above 1 if the pair's first subject is better."""
        ratio, (ours, peer) = None, self.values
        if ours and peer:
            ratio = peer / ours if self.lower_is_better else ours / peer
        floor, aim = goals.get(self.what, (None, None))
        row = {"what": self.what, "unit": self.unit, self.pair[0]: ours, self.pair[1]: peer, "ratio": ratio}
        row |= {"floor": floor, "aim": aim, "met": None if ratio is None or floor is None else ratio >= floor}
        if self.limit is not None and ours:
            row["of limit"] = self.limit / ours if self.lower_is_better else ours / self.limit
        return row


@dataclass
class Decode:
    """Decode time per step and prefill rate, as `shoal bench latency` measures them."""

    batch: int
    context: int
    vocab_size: int
    num_decoded: int = NUM_DECODED
    model: Dense | None = None
    rates: Rates | None = None
    timings: dict[str, Timing] = field(default_factory=dict)

    def measure(self, name: str, subject: Run, turn: int) -> None:
        timing = self.timings.setdefault(name, Timing(self.batch, self.context, self.num_decoded))
        timing.add_round(subject, random.Random(f"{self.batch} {self.context} {turn}"), self.vocab_size)

    def figures(self, pair: Pair = (OURS, PEER)) -> Iterator[Figure]:
        which = f"B={self.batch} @{self.context}"
        ours, peer = (self._timing(name) for name in pair)
        limit = prefill_limit = None
        if self.model is not None and self.rates is not None:
            like = Timing(self.batch, self.context, self.num_decoded)
            limit = like.decode_limit_s(self.model, self.rates) * 1e3
            prefill_limit = like.prefill_limit(self.model, self.rates)
        step_ms = [timing and timing.decode_s * 1e3 for timing in (ours, peer)]
        yield Figure(f"decode {which}", "ms", step_ms, True, limit, pair)
        prefill = [timing and timing.prefill_rate for timing in (ours, peer)]
        yield Figure(f"prefill {which}", "tok/s", prefill, False, prefill_limit, pair)

    def _timing(self, name: str) -> Timing | None:
        timing = self.timings.get(name)
        return timing if timing is not None and timing.all_s else None


@dataclass
class Offline:
    """Output tokens per second of requests of mixed lengths, all submitted at once."""

    workload: Workload
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def measure(self, name: str, subject: Run, turn: int) -> None:
        del turn  # every turn has the same workload
        self.seconds.setdefault(name, []).append(subject(self.workload))

    def figures(self, pair: Pair = (OURS, PEER)) -> Iterator[Figure]:
        num_tokens = self.workload.num_output_tokens
        rates = [num_tokens / median(self.seconds[name]) if name in self.seconds else None for name in pair]
        yield Figure("offline throughput", "output tok/s", rates, False, pair=pair)


@dataclass
class Http:
    """A server under a fixed number of concurrent requests."""

    concurrency: int
    num_requests: int
    shape: serving.Shape
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def measure(self, name: str, subject: Target, turn: int) -> None:
        row = serving.measure(subject, self.shape, self.num_requests, concurrency=self.concurrency, seed=turn)
        self.rows.setdefault(name, []).append(row)

    def figures(self, pair: Pair = (OURS, PEER)) -> Iterator[Figure]:
        yield self._figure(pair, "output tok/s", "tok/s", lower_is_better=False)
        for name in ("TTFT", "TPOT", "ITL"):
            for share in (50, 99):
                yield self._figure(pair, f"{name} p{share}", "ms", lower_is_better=True)

    def _figure(self, pair: Pair, column: str, unit: str, *, lower_is_better: bool) -> Figure:
        values = [median(row[column] for row in self.rows[name]) if name in self.rows else None for name in pair]
        return Figure(f"c={self.concurrency} {column}", unit, values, lower_is_better, pair=pair)


def alternate(
    rows: Sequence[Row[Subject]],
    subjects: Mapping[str, Subject],
    deadline: float,
    after_each: Callable[[], None],
    num_turns: int = 2,
    say: Callable[[str], None] = print,
) -> None:
    """Measure every row of every subject, then again while it fits before `deadline`
    (`time.monotonic`).

    A subject that fails is left out of that row, with a message.
    """
    spent = dict.fromkeys(range(len(rows)), 0.0)
    for turn in range(num_turns):
        for index, row in enumerate(rows):
            begin = time.monotonic()
            if turn and begin + spent[index] > deadline:
                say(f"turn {turn + 1} of row {index + 1} is left out: it takes {spent[index]:.0f} s")
                continue
            for name, subject in subjects.items():
                try:
                    row.measure(name, subject, turn)
                except Exception as error:  # a failed measurement leaves the other rows useful
                    say(f"{name} failed at row {index + 1}: {error}")
                after_each()
            spent[index] = time.monotonic() - begin
            say(f"row {index + 1}, turn {turn + 1}: {spent[index]:.1f} s")
