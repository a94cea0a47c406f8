"""Device time of one operator call, without host time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from statistics import median

import torch

Thunk = Callable[[], object]

_ROUNDS = 7
_WARM_ROUNDS = 2
_ROUND_S = 2e-3  # a round; a longer call is a round by itself
_MAX_CALLS = 200


def seconds_per_call(thunks: Sequence[Thunk], device: str) -> float:
    """Median over rounds of calls that rotate through `thunks`: the same work on different
    memory.

    On a GPU a round is one replay of a CUDA graph, so that launches cost what they cost in a
    captured step.
    """
    for thunk in thunks:
        thunk()  # compiles
    if device != "cuda":
        return _on_host(thunks)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    thunks[0]()
    torch.cuda.synchronize()
    num_calls = max(len(thunks), min(_MAX_CALLS, int(_ROUND_S / (time.perf_counter() - begin)) + 1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for thunk in islice(cycle(thunks), num_calls):
            thunk()
    times = []
    for _ in range(_ROUNDS + _WARM_ROUNDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e-3)
    return median(times[_WARM_ROUNDS:]) / num_calls


def _on_host(thunks: Sequence[Thunk]) -> float:
    times = []
    for thunk in islice(cycle(thunks), _ROUNDS * len(thunks)):
        begin = time.perf_counter()
        thunk()
        times.append(time.perf_counter() - begin)
    return median(times)
