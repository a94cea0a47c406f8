"""Runner start-up: compile Triton kernels, run every graph shape once, capture CUDA graphs."""

from __future__ import annotations

import logging
import time

import torch

from ...kernels.compiling.compile_process import CompilationFailed, CompileProcess
from ..device import usable_cores
from ..layers.batch import GraphShape
from .graphs import decode_shapes, mixed_shapes, with_filtered
from .runner import Runner

logger = logging.getLogger(__name__)


def graph_shapes(runner: Runner, max_tokens: int) -> tuple[list[GraphShape], list[GraphShape]]:
    """Shapes of captured steps of up to `max_tokens` tokens: without and with prefills."""
    decode, mixed = decode_shapes(runner.max_rows), mixed_shapes(runner.max_rows, max_tokens)
    split = runner.samples and runner.sampler.is_split
    return (with_filtered(decode), with_filtered(mixed)) if split else (decode, mixed)


@torch.inference_mode()
def compile_kernels(runner: Runner, process: CompileProcess, max_tokens: int, num_neighbours: int = 1) -> int:
    """Compile the Triton kernels that steps launch, many at a time; returns how many were
    compiled.

    max_tokens: of steps that will be captured. num_neighbours: runners sharing this machine's
    cores. Call it first, on a runner that is then dropped. On failure it logs, and kernels
    compile at their first launch.
    """
    from ...kernels.compiling.compile_triton import compile_kernels, dry_run

    begin = time.perf_counter()
    with dry_run() as kernels:
        warm_up(runner, max_tokens)
    found = time.perf_counter()
    try:
        num_compiled = compile_kernels(kernels, process, max(1, usable_cores() // num_neighbours))
    except CompilationFailed as error:
        logger.warning("kernels compile at their first launch, one after the other: %s", error)
        return 0
    logger.info(
        "steps launch %d kernels, found in %.1f s; compiled %d of them in %.1f s",
        len(kernels), found - begin, num_compiled, time.perf_counter() - found,
    )  # fmt: skip
    return num_compiled


@torch.inference_mode()
def warm_up(runner: Runner, max_tokens: int) -> None:
    """Run every captured shape, the largest shape and the sampler's slow path once.

    Layers of one kind run once (`dedup_layers`); the results are meaningless.
    """
    decode, mixed = graph_shapes(runner, max_tokens)
    largest = graph_shapes(runner, runner.max_tokens)[1][-1]
    for shape in (*decode, *mixed, largest):
        _forward_once(runner, shape)
    if runner.samples:
        runner.sampler.warm_up(runner.model.compute_logits(runner.sampled_states))


def capture_graphs(runner: Runner, max_tokens: int) -> None:
    """Capture CUDA graphs of steps of up to `max_tokens` tokens; larger steps run kernel by kernel."""
    decode, mixed = graph_shapes(runner, max_tokens)
    runner.graphs.capture(runner.forward, lambda shape: _forward_once(runner, shape), decode, mixed)


def _forward_once(runner: Runner, shape: GraphShape) -> None:
    with runner.model.dedup_layers():
        runner.forward(shape)
