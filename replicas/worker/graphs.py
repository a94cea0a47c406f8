"""CUDA graphs of whole steps, one per graph shape, replayed for any step that fits.

A replay is one launch instead of some three hundred. Unused entries of the inputs
(device_inputs.py) are padding. Decode graphs run one-token slices; mixed graphs run both kinds and
read their numbers on the device. Graphs share a memory pool.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import torch

from ..layers.batch import FEW_DECODES, GraphShape, StepOutputs

_SAMPLED_PREFILLS = 16  # prompts that may end in one step, where not every row decodes


def decode_shapes(max_rows: int) -> list[GraphShape]:
    """Shapes of decode graphs, finely spaced: a padded sequence costs as much as a real one."""
    sizes = {*(1, 2, 4), *range(8, 128, 8), *range(128, max_rows, 16), max_rows}
    return [GraphShape(size, size, 0, size) for size in sorted(sizes) if size <= max_rows]


def mixed_shapes(max_rows: int, max_tokens: int) -> list[GraphShape]:
    """Shapes of graphs with prefills: padding is at most an eighth, or 64 tokens.

    Each size exists for no, few and most decodes: attention divides the device among decode
    slots, so one long context among 256 slots gets little. One prefill slot per 8 tokens: 255
    of padding cost 5 to 9 us a layer on an H200, too much for a small step.
    """
    sizes, size = [], 64
    while size < max_tokens:
        sizes.append(size)
        size += max(64, size // 8 // 64 * 64)
    sizes.append(max_tokens)
    shapes = []
    for size in sizes:
        for decodes in sorted({0, min(FEW_DECODES, size, max_rows), min(size, max_rows)}):
            samples = min(decodes + _SAMPLED_PREFILLS, size, max_rows)
            shapes.append(GraphShape(size, decodes, min(max_rows, max(8, size // 8)), samples))
    return shapes


def with_filtered(shapes: list[GraphShape]) -> list[GraphShape]:
    """Each shape without and with filters: two programs if logits are split over ranks."""
    return [replace(shape, filtered=filtered) for shape in shapes for filtered in (False, True)]


class StepGraphs:
    """Captured graphs, by shape."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[GraphShape, tuple[torch.cuda.CUDAGraph, StepOutputs]] = {}
        self._decode: list[GraphShape] = []
        self._mixed: list[GraphShape] = []

    def capture(
        self,
        run: Callable[[GraphShape], StepOutputs],
        warm_up: Callable[[GraphShape], object],
        decode: list[GraphShape],
        mixed: list[GraphShape],
    ) -> None:
        """Capture every shape, the largest first, on the inputs of an empty plan (all
        padding).

        decode, mixed: shapes by number of tokens. warm_up: launches each kernel of `run` on
        the same shape, to initialise kernels and libraries. It may launch them fewer times:
        some hundred launches take the host as long as a capture.
        """
        stream, pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for shape in sorted((*decode, *mixed), key=lambda shape: shape.tokens, reverse=True):
                warm_up(shape)
                stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                # Not torch.cuda.graph(): it collects garbage and empties the allocator's cache each
                # time.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                outputs = run(shape)
                graph.capture_end()
                self._graphs[shape] = graph, replace(outputs, hidden=None, logits=None)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._decode, self._mixed = decode, mixed

    def replay(self, shape: GraphShape) -> StepOutputs | None:
        """Run the step in the smallest graph that fits, or return None."""
        shapes = self._mixed if shape.prefills else self._decode
        first = bisect_left(shapes, shape.tokens, key=lambda candidate: candidate.tokens)
        fitting = next((candidate for candidate in shapes[first:] if candidate.holds(shape)), None)
        if fitting is None:
            return None
        graph, outputs = self._graphs[fitting]
        graph.replay()
        return outputs
