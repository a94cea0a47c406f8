"""Simulation of the scheduler's plans on a pipeline, with step times of an 8B model on H200s.

Plans are the real scheduler's; their times per stage are looked up. Stages wait as in
replicas/parallel/pipeline.py: for the stage before, for the stage after to receive, and for the tokens that the
plan reads. `ratio` is output tokens/s relative to one GPU with as many sequences a stage; `busy` is the share
of time that the busiest stage works. One core, no GPU.

    python -m benchmarks.pipeline_schedule [--json PATH]
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.report import Report
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts, ParallelConfig, SchedulerConfig
from shoal.replicas.engine.scheduler import Scheduler
from shoal.replicas.plan import DEVICE_TOKEN, StepPlan, StepResult
from shoal.replicas.protocol import Request, SamplingParams
from shoal.replicas.stages import split_costs
from shoal.replicas.worker.graphs import decode_shapes, mixed_shapes

FACTS = ModelFacts("Fake", 32, 8, 1, 1, 8, 1000, 8192, (2,), "float32")
SEQUENCES, NUM_BLOCKS = 256, 40_000  # of a stage; of 64 tokens
# Requests, and the shortest and longest prompt and output.
WORKLOADS = {
    "100 to 512 in and out": (2000, (100, 512), (100, 512)),
    "the same, a longer run": (4000, (100, 512), (100, 512)),
    "long prompts": (600, (1500, 2500), (64, 256)),
    "short prompts": (1500, (16, 64), (200, 500)),
}
# Milliseconds of 32 layers without reading keys and values, by tokens of a step: from decode at 1k and from
# prefill (tables vs_vllm_8b and parallel_8b). Keys and values: 131,072 bytes a token at 4 TB/s.
TOKENS = [1, 32, 64, 128, 256, 512, 1024, 2048, 6144]
LAYERS_MS = [3.75, 3.95, 4.35, 4.7, 7.4, 12.3, 23, 46, 139]
KV_MS = 131_072 / 4.0e12 * 1e3
HEAD_MS, SAMPLE_MS = 0.3, 0.0004  # of the last stage: once, and for each sample
STEP_MS, LINK_MS, HOST_MS = 0.03, 0.03, 0.15  # gaps of a step on a stage; a transfer; the engine's work on a step
LAYER_COST, HEAD_COST = 218, 525  # millions of parameters
GRAPH_TOKENS = 2048


@dataclass
class Pipeline:
    """When each stage is free, in milliseconds, and for how long it has worked."""

    num_layers: list[int]
    free: list[float] = field(init=False)
    busy: list[float] = field(init=False)
    known: dict[int, float] = field(default_factory=dict)  # when a row's last token is on the first stage

    def __post_init__(self) -> None:
        self.free, self.busy = [0.0] * len(self.num_layers), [0.0] * len(self.num_layers)

    def run(self, plan: StepPlan, now: float) -> float:
        """When the tokens of the plan submitted at `now` are ready."""
        last = len(self.num_layers) - 1
        readers = plan.rows[: _num_decodes(plan)][plan.token_ids[: _num_decodes(plan)] == DEVICE_TOKEN]
        ready = max([now, *(self.known.get(row, 0.0) for row in readers.tolist())])
        layers_ms = _layers_ms(plan)
        for stage, num_layers in enumerate(self.num_layers):
            work = STEP_MS + layers_ms * num_layers / sum(self.num_layers)
            work += HEAD_MS + SAMPLE_MS * len(plan.sample_rows) if stage == last else 0.0
            end = max(ready, self.free[stage]) + work
            self.busy[stage] += work
            ready = end if stage == last else max(end, self.free[stage + 1]) + LINK_MS
            self.free[stage] = ready
        self.known.update(dict.fromkeys(plan.sample_rows.tolist(), ready + LINK_MS))
        return ready


def _num_decodes(plan: StepPlan) -> int:
    return int(np.count_nonzero(plan.num_tokens == 1))


def _layers_ms(plan: StepPlan) -> float:
    num_tokens = len(plan.token_ids)
    rooms = decode_shapes(SEQUENCES) if _num_decodes(plan) == len(plan.rows) else mixed_shapes(SEQUENCES, GRAPH_TOKENS)
    padded = next((room.tokens for room in rooms if room.tokens >= num_tokens), num_tokens)
    return float(np.interp(padded, TOKENS, LAYERS_MS)) + float((plan.starts + plan.num_tokens).sum()) * KV_MS


def simulate(num_stages: int, workload: str) -> tuple[float, float]:
    """Output tokens a second of all requests submitted at once, and the busy share of the busiest stage."""
    config = EngineConfig(
        ModelConfig("fake"),
        CacheConfig(64, NUM_BLOCKS, enable_prefix_caching=False),
        SchedulerConfig(SEQUENCES * num_stages, 6144),
        ParallelConfig(1, num_stages),
    ).resolve(FACTS, "cuda")
    scheduler, draw, num_output_tokens = Scheduler(config, FACTS, NUM_BLOCKS), random.Random(1), 0
    num_requests, prompts, outputs = WORKLOADS[workload]
    for number in range(num_requests):
        prompt, max_tokens = draw.choices(range(10, 1000), k=draw.randint(*prompts)), draw.randint(*outputs)
        num_output_tokens += max_tokens
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        scheduler.add(Request(str(number), tuple(prompt), sampling))
    layers = [len(stage) for stage in split_costs([LAYER_COST] * 32, HEAD_COST, num_stages)]
    pipeline, in_flight, now = Pipeline(layers), deque[tuple[StepPlan, float]](), 0.0
    while scheduler.requests:
        while len(in_flight) < config.scheduler.max_steps_in_flight and (plan := scheduler.plan()) is not None:
            now += HOST_MS / 2
            in_flight.append((plan, pipeline.run(plan, now)))
        plan, done = in_flight.popleft()
        now = max(now, done) + HOST_MS / 2
        scheduler.update(StepResult(plan.step, np.full(len(plan.sample_rows), 7, np.int32)))
    return num_output_tokens / now * 1e3, max(pipeline.busy) / now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go instead of benchmarks/results")
    path = parser.parse_args().json
    report = Report("pipeline_schedule", settings={"sequences of a stage": SEQUENCES, "step times": "8B on H200s"})
    report.device = "simulated"
    for workload in WORKLOADS:
        one = 0.0
        for num_stages in (1, 2, 4):
            rate, busy = simulate(num_stages, workload)
            one = one or rate
            report.add(workload=workload, stages=num_stages, **{"tok/s": rate, "ratio": rate / one, "busy": busy})
    report.show()
    report.write(path)


if __name__ == "__main__":
    main()
