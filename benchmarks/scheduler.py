"""A decode step of scheduler and block pool: plan and update, with two steps in flight.

Contexts have random lengths, so that some sequences begin a new block in every step. Time is that of
`Scheduler.plan` and `Scheduler.update`; the executor returns an array of ones. `engine` adds the token deltas,
one Python object per token. Goals: 100 us at 256 sequences, 1 ms at 10,000, on one core. Each step of a
pipeline decodes one micro-batch. Beside it: allocating and releasing eight blocks, and matching a prompt of
1,024 tokens against the prefix cache, with and without hashing.

    taskset -c 0 python -m benchmarks.scheduler [--sequences 256 10000] [--stages 1 2] [--steps 400] [--json PATH]
"""

from __future__ import annotations

import argparse
import gc
import random
from collections import deque
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter_ns

import numpy as np

from benchmarks.report import Report
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts, ParallelConfig, SchedulerConfig
from shoal.replicas.engine.block_pool import BlockPool, extend_hashes
from shoal.replicas.engine.engine import Engine
from shoal.replicas.plan import StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams

BLOCK_SIZE = 16
MAX_MODEL_LEN = 1024
VOCAB_SIZE = 32_000
GOALS = {256: 100.0, 10_000: 1000.0}  # us a step
FACTS = ModelFacts("Fake", 8, 8, 1, 1, 8, VOCAB_SIZE, MAX_MODEL_LEN, (2,), "float32")


class ConstantExecutor:
    """Answers every plan at once with the same token."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._plans: deque[StepPlan] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._plans)

    def submit(self, plan: StepPlan) -> None:
        self._plans.append(plan)

    def result(self) -> StepResult:
        return answer(self._plans.popleft())

    def shutdown(self) -> None:
        self._plans.clear()


def answer(plan: StepPlan) -> StepResult:
    return StepResult(plan.step, np.ones(len(plan.sample_rows), np.int32))


def full_engine(num_sequences: int, num_steps: int, num_stages: int = 1) -> tuple[Engine, ConstantExecutor]:
    """An engine with `num_sequences` prefilled sequences that decode for longer than `num_steps`."""
    num_blocks = num_sequences * -(-(64 + 2 * num_steps) // BLOCK_SIZE)
    config = EngineConfig(
        ModelConfig("fake"),
        CacheConfig(BLOCK_SIZE, num_blocks),
        SchedulerConfig(num_sequences, max_num_batched_tokens=40 * num_sequences),  # all prompts in one step
        ParallelConfig(pipeline_parallel_size=num_stages),
    ).resolve(FACTS, "cpu")
    executor = ConstantExecutor(num_blocks)
    engine = Engine(config, FACTS, executor)
    draw = random.Random(0)
    sampling = SamplingParams(max_tokens=2 * num_steps, stop_token_ids=(5,))
    for i in range(num_sequences):
        prompt = tuple(draw.choices(range(8, VOCAB_SIZE), k=draw.randint(8, 40)))
        engine.add_request(Request(str(i), prompt, sampling))
    while engine.scheduler.table.decoding.sum() < num_sequences:
        engine.step()
    for _ in range(4 * num_stages):  # until the micro-batches are equal
        engine.step()
    return engine, executor


def time_scheduler(num_sequences: int, num_steps: int, num_stages: int) -> list[float]:
    """Microseconds of each decode step: one plan and one update."""
    engine, executor = full_engine(num_sequences, num_steps, num_stages)
    scheduler = engine.scheduler
    times: list[float] = []
    results = deque(executor.result() for _ in range(executor.num_in_flight))  # of the steps still in flight
    for _ in range(num_steps):
        begin = perf_counter_ns()
        plan = scheduler.plan()
        scheduler.update(results[0])
        times.append((perf_counter_ns() - begin) / 1e3)
        assert plan is not None
        assert abs(plan.num_slices - num_sequences / num_stages) <= num_stages
        results.popleft()
        results.append(answer(plan))
    return times


def time_engine(num_sequences: int, num_steps: int) -> list[float]:
    """Microseconds of each Engine.step, token deltas included."""
    engine, _ = full_engine(num_sequences, num_steps)
    times: list[float] = []
    for _ in range(num_steps):
        begin = perf_counter_ns()
        deltas = engine.step()
        times.append((perf_counter_ns() - begin) / 1e3)
        assert len(deltas) == num_sequences
    return times


def time_calls(function: Callable[[], object], num_calls: int) -> list[float]:
    times: list[float] = []
    for _ in range(num_calls):
        begin = perf_counter_ns()
        function()
        times.append((perf_counter_ns() - begin) / 1e3)
    return times


def time_pool(report: Report) -> None:
    pool = BlockPool(4096, BLOCK_SIZE)
    add(report, "allocate + release 8 blocks", time_calls(lambda: pool.release(pool.allocate(8)), 2000))
    prompt = np.random.default_rng(0).integers(0, VOCAB_SIZE, 1024).astype(np.int32)
    known: list[bytes] = []
    extend_hashes(known, prompt, BLOCK_SIZE, "")
    pool.register(pool.allocate(len(known)), known)

    def match() -> None:
        hashes: list[bytes] = []
        extend_hashes(hashes, prompt, BLOCK_SIZE, "")
        assert len(pool.lookup(hashes)) == len(known)

    add(report, "hash and match 1,024 tokens", time_calls(match, 1000))
    add(report, "match 1,024 hashed tokens", time_calls(lambda: pool.lookup(known), 1000))


def add(report: Report, what: str, times: list[float], goal: float | None = None) -> None:
    middle = median(times)
    percentiles = quantiles(times, n=100)
    report.add(
        what=what,
        median_us=round(middle, 2),
        p99_us=round(percentiles[98], 2),
        goal_us=goal,
        goal_over_median=round(goal / middle, 2) if goal else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=sorted(GOALS))
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2], help="of a pipeline")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, default=None, help="where to write the report")
    options = parser.parse_args()
    if not 16 <= options.steps <= 480:
        parser.error(f"--steps {options.steps} is outside 16..480: contexts hold {MAX_MODEL_LEN} tokens")
    report = Report("scheduler", settings={"block_size": BLOCK_SIZE, "steps": options.steps})
    gc.collect()
    gc.freeze()  # exclude what lives as long as the process
    for num_stages, num_sequences in product(options.stages, options.sequences):
        times = time_scheduler(num_sequences, options.steps, num_stages)
        parts = f" in {num_stages} micro-batches" if num_stages > 1 else ""
        add(report, f"scheduler step, {num_sequences:,} sequences{parts}", times, GOALS.get(num_sequences))
    for num_sequences in options.sequences:
        add(report, f"engine step, {num_sequences:,} sequences", time_engine(num_sequences, min(options.steps, 100)))
    time_pool(report)
    report.show()
    if options.json is not None:
        report.write(options.json)


if __name__ == "__main__":
    main()
