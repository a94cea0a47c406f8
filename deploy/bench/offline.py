"""`shoal bench latency` and `shoal bench throughput`: an engine in this process, without HTTP."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from ...replicas.errors import ConfigError
from . import latency
from .engines import OpenEngine
from .limits import Dense, Rates
from .rates import measure_rates
from .report import Report, device_name
from .trace import all_decoding, some_finished, trace_steps
from .workload import Workload, engine_run, fixed_lengths, mixed_lengths

_SEED = 0
# Steps before and within a trace; traced sequences must be longer.
_TRACED_TOKENS = 512


def run_latency(
    report: Report,
    opened: OpenEngine,
    batches: list[int],
    contexts: list[int],
    *,
    num_decoded: int = latency.NUM_DECODED,
    rounds: int = 2,
    trace: Path | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """A row for each context and batch; with `trace`, one traced run of the first."""
    vocab_size = opened.engine.facts.vocab_size
    run, draw = engine_run(opened.engine), random.Random(_SEED)
    _check_trace(opened, trace)
    # A token passes all pipeline stages one after the other.
    dense, rates = _limits(opened, opened.engine.config.parallel.tensor_parallel_size)
    _describe(report, opened, rates)
    latency.warm_up(run, draw, vocab_size)
    for context in contexts:
        for batch in batches:
            timing = latency.Timing(batch, context, num_decoded)
            for _ in range(rounds):
                timing.add_round(run, draw, vocab_size)
            report.add(**latency.row(timing, dense, rates))
            after_each()
    if trace is not None:
        workload = fixed_lengths(draw, batches[0], contexts[0], _room(opened, contexts[0]), vocab_size)
        _trace(report, opened, workload, trace, until_finished=0)


def run_throughput(
    report: Report,
    opened: OpenEngine,
    *,
    num_requests: int = 1000,
    lengths: tuple[int, int] = (100, 1024),
    trace: Path | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """One row: all requests submitted at once, timed to the last token."""
    engine = opened.engine
    run = engine_run(engine)
    _check_trace(opened, trace)
    dense, rates = _limits(opened, engine.config.parallel.world_size)
    _describe(report, opened, rates)
    latency.warm_up(run, random.Random(_SEED), engine.facts.vocab_size)
    workload = mixed_lengths(num_requests, *lengths, engine.facts.vocab_size)
    before = engine.load()
    elapsed = run(workload)
    after = engine.load()
    row = {
        "requests": num_requests,
        "seconds": elapsed,
        "output tok/s": workload.num_output_tokens / elapsed,
        "total tok/s": (workload.num_output_tokens + workload.num_prompt_tokens) / elapsed,
        "steps": after.num_steps - before.num_steps,
        "preemptions": after.num_preemptions - before.num_preemptions,
    }
    if dense is not None:
        least = throughput_limit_s(dense, rates, workload, engine.config.scheduler.max_num_seqs)
        row |= {"limit tok/s": workload.num_output_tokens / least, "of limit": least / elapsed}
    report.add(**row)
    after_each()
    if trace is not None:
        _trace(report, opened, workload, trace, until_finished=1)


def throughput_limit_s(model: Dense, rates: Rates, workload: Workload, max_num_seqs: int) -> float:
    """Lower bound of a workload: each prompt prefilled, and all tokens decoded in full batches of mean context."""
    pairs = list(zip(map(len, workload.prompts), workload.num_new_tokens, strict=True))
    prefill = sum(model.prefill_s(prompt, rates) for prompt, _ in pairs)
    num_tokens = workload.num_output_tokens
    context = sum(new * (prompt + new / 2) for prompt, new in pairs) / num_tokens
    batch = min(max_num_seqs, len(pairs))
    return prefill + num_tokens / batch * model.decode_s(batch, context, rates)


def _limits(opened: OpenEngine, num_ranks: int) -> tuple[Dense | None, Rates]:
    """The model's sizes per rank (None if not dense), and the device's rates."""
    dtype = opened.engine.config.model.dtype
    rates = measure_rates(opened.device, getattr(torch, dtype))
    try:
        return Dense.of(opened.folder, dtype, num_ranks), rates
    except ConfigError:
        return None, rates


def _describe(report: Report, opened: OpenEngine, rates: Rates) -> None:
    config = opened.engine.config
    name, world_size = device_name(opened.device), config.parallel.world_size
    report.device = f"{world_size} x {name}" if world_size > 1 and opened.device == "cuda" else name
    report.settings |= {
        "dtype": config.model.dtype,
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "pipeline_parallel_size": config.parallel.pipeline_parallel_size,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "load_s": round(opened.load_s, 2),
        "copy GB/s": round(rates.bytes_per_s / 1e9, 1),
        "matmul TFLOP/s": round(rates.flops / 1e12, 3),
    }


def _check_trace(opened: OpenEngine, trace: Path | None) -> None:
    world_size = opened.engine.config.parallel.world_size
    if trace is not None and world_size > 1:
        raise ConfigError(
            f"a trace is of this process, and the model runs in {world_size} others; trace it with "
            "tensor_parallel_size and pipeline_parallel_size 1"
        )


def _room(opened: OpenEngine, context: int) -> int:
    return min(_TRACED_TOKENS, opened.engine.config.model.max_model_len - context)


def _trace(report: Report, opened: OpenEngine, workload: Workload, path: Path, *, until_finished: int) -> None:
    reached = some_finished(until_finished) if until_finished else all_decoding(workload)
    figures = trace_steps(opened.engine, workload, reached, path)
    report.trace = {"file": path.name, "requests": len(workload.prompts), **figures}
