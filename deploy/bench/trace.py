"""Where the time of a step goes: a few steps of an engine under torch's profiler.

The trace is written for chrome://tracing or Perfetto. From its events: how long the GPU was idle, and the share of each
family of kernels. The profiler itself costs the host some microseconds for every kernel, also of a CUDA graph; how long
the host works on a step is therefore taken, like `step ms`, from as many steps without it, just before: their median.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from ...replicas.engine.engine import Engine
from ...replicas.errors import ConfigError
from ...replicas.protocol import FinishReason, TokenDelta
from .workload import Workload, requests_of

_WINDOW = "shoal.bench steps"
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
# Family of a kernel by its name; the first that matches. CPU operators (aten::mm) go by the same names.
_FAMILIES = (
    ("copy", r"^mem(cpy|set)|block_copy|aten::(copy_|_?to|cat|clone)"),
    ("moe", r"moe|expert"),
    ("attention", r"paged_(decode|prefill)|flash|fmha|attention|aten::bmm|baddbmm"),
    ("sampling", r"sampl|gumbel|top_?[kp]|arg_?max|penalt|score|sort|log_?softmax|philox|random|exponential"),
    ("norm", r"norm"),
    ("rope and KV write", r"rope|rotary|kv_store"),
    ("activation", r"silu|gelu|swiglu|act_and_mul"),
    ("embedding", r"embed|gather|index_?select|index_copy"),
    ("inputs", r"(expand|apply)_plan|store_tokens|step_inputs"),
    (
        "GEMM",
        r"gemm|gemv|_(fma|mma|stream)_kernel|nvjet|cutlass|cublas|mkldnn|splitk|matmul|linear|aten::(add)?mm\b|dot",
    ),
)
_COMPILED = tuple((family, re.compile(pattern, re.IGNORECASE)) for family, pattern in _FAMILIES)


def family_of(name: str) -> str:
    """The family of a kernel or operator; "other" where none is known."""
    return next((family for family, pattern in _COMPILED if pattern.search(name)), "other")


def all_decoding(workload: Workload) -> Callable[[list[TokenDelta]], bool]:
    """True once every sequence has had a token."""
    waiting = set(range(len(workload.prompts)))

    def reached(deltas: list[TokenDelta]) -> bool:
        waiting.difference_update(int(delta.request_id) for delta in deltas)
        return not waiting

    return reached


def some_finished(num_finished: int) -> Callable[[list[TokenDelta]], bool]:
    """True once that many sequences have ended: others have taken their places."""
    seen = 0

    def reached(deltas: list[TokenDelta]) -> bool:
        nonlocal seen
        seen += sum(delta.finish_reason == FinishReason.LENGTH for delta in deltas)
        return seen >= num_finished

    return reached


def trace_steps(
    engine: Engine,
    workload: Workload,
    reached: Callable[[list[TokenDelta]], bool],
    path: Path,
    num_steps: int = 16,
) -> dict[str, Any]:
    """Run the workload until `reached`, then `num_steps` steps without and with the profiler; returns the figures.

    The workload must last that long. Its sequences are aborted afterwards.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    for request in requests_of(workload):
        engine.add_request(request)
    while not reached(engine.step()):
        if not engine.has_work:
            raise ConfigError("the workload ended before the state that was to be traced; give more or longer requests")
    step_s, host_s = _step_and_host_s(engine, num_steps)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if engine.config.device == "cuda" else [])
    with profile(activities=activities) as profiler:
        _steps(engine, 2)  # the profiler's own start is not a step's time
        with record_function(_WINDOW):
            _steps(engine, num_steps)
        if engine.config.device == "cuda":
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    engine.end_all()
    while engine.has_work:
        engine.step()
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return {"step ms": step_s * 1e3, "host us": host_s * 1e6} | summary(events, num_steps)


@contextmanager
def _waiting_time() -> Iterator[list[float]]:
    """Seconds that this process's engine waits for its device, one entry a wait."""
    from ...replicas.host_copy import HostCopy

    waited: list[float] = []
    wait = HostCopy.wait

    def timed(self: HostCopy) -> Any:
        begin = time.perf_counter()
        try:
            return wait(self)
        finally:
            waited.append(time.perf_counter() - begin)

    HostCopy.wait = timed
    try:
        yield waited
    finally:
        HostCopy.wait = wait


def _step_and_host_s(engine: Engine, num_steps: int) -> tuple[float, float]:
    """Seconds of a step, and those of them in which the host works: medians of `num_steps`."""
    step_s, host_s = [], []
    with _waiting_time() as waited:
        for _ in range(num_steps):
            waited.clear()
            begin = time.perf_counter()
            _steps(engine, 1)
            step_s.append(time.perf_counter() - begin)
            host_s.append(step_s[-1] - sum(waited))
    return median(step_s), median(host_s)


def _steps(engine: Engine, num_steps: int) -> None:
    for _ in range(num_steps):
        if not engine.has_work:
            raise ConfigError(f"the workload ended within {num_steps} steps to be traced; give longer requests")
        engine.step()


def summary(events: Iterable[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """The figures of a trace's window: microseconds a step, idle share of the GPU, share of each family in percent."""
    complete = [event for event in events if event.get("ph") == "X"]
    window = next(e for e in complete if e.get("name") == _WINDOW and e.get("cat") == "user_annotation")
    begin, end = window["ts"], window["ts"] + window["dur"]
    inside = [event for event in complete if event["ts"] < end and event["ts"] + event["dur"] > begin]
    kernels = [event for event in inside if event.get("cat") in _DEVICE]
    span = end - begin
    figures: dict[str, Any] = {"profiled step us": span / num_steps}
    if kernels:
        figures["GPU idle %"] = 100 * (1 - _covered(kernels, begin, end) / span)
        figures["kernels"] = len(kernels) / num_steps
        kernels = _in_turn(kernels)
    else:
        kernels = _own_times([e for e in inside if e.get("cat") == "cpu_op" and e.get("tid") == window["tid"]])
    times, unknown = Counter[str](), Counter[str]()
    for event in kernels:
        family = family_of(event["name"])
        times[family] += event["dur"]
        if family == "other":
            unknown[event["name"]] += event["dur"]
    total = sum(times.values()) or 1.0
    figures |= {f"{family} %": 100 * spent / total for family, spent in times.most_common()}
    if unknown:
        figures["other, most of it"] = ", ".join(name[:60] for name, _ in unknown.most_common(3))
    return figures


def _covered(events: list[dict[str, Any]], begin: float, end: float) -> float:
    """How much of begin..end at least one event covers."""
    covered, reach = 0.0, begin
    for event in sorted(events, key=lambda e: e["ts"]):
        start, stop = max(event["ts"], reach), min(event["ts"] + event["dur"], end)
        if stop > start:
            covered += stop - start
            reach = stop
    return covered


def _in_turn(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels with the time that none before them was running: one that starts early (PDL) waits for those."""
    counted, reach = [], float("-inf")
    for event in sorted(kernels, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        counted.append({"name": event["name"], "dur": max(0.0, end - max(event["ts"], reach))})
        reach = max(reach, end)
    return counted


def _own_times(operators: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Operators of one thread, each with the time it did not spend in others: what computes, where there is no GPU."""
    own: list[dict[str, Any]] = []
    open_ones: list[dict[str, Any]] = []
    for event in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        while open_ones and open_ones[-1]["end"] <= event["ts"]:
            open_ones.pop()
        if open_ones:
            open_ones[-1]["dur"] -= event["dur"]
        entry = {"name": event["name"], "dur": event["dur"], "end": event["ts"] + event["dur"]}
        own.append(entry)
        open_ones.append(entry)
    return own
