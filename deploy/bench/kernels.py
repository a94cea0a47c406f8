"""`shoal bench kernels`: every operator at the shapes of one model, and its peers.

Times are those of `timing.py`, over more copies of the data than caches hold. Bytes and flops come
from the operators' cost functions. `of limit` is the larger of bytes over the copy rate and flops
over the matmul rate, both measured in this run, over the time. A copy alternates reads and writes,
which costs a tenth: a kernel that only reads can reach 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ...replicas.models.checkpoint import read_json, read_model_facts
from .attention_cases import attention_cases
from .kernel_cases import Case, Sizes, gemm_cases, row_cases
from .limits import Rates
from .rates import measure_rates
from .report import Report, device_name
from .step_cases import moe_cases, step_cases
from .timing import seconds_per_call

# Bytes that calls rotate over. An H200's L2 has 60 MB, and a step reads tens of GB: address
# translations are not
# cached there either.
_SPREAD_BYTES = 8 << 30
_MAX_COPIES = 24
_MAX_BATCH = 256  # sequences that decode together; more tokens are a prefill


# Experts of a layer of Qwen3-30B-A3B: experts, experts per token, hidden and inner size.
_EXPERTS = (128, 8, 2048, 768)


def cases_of(
    folder: Path, tokens: Sequence[int], contexts: Sequence[int], device: str, dtype: torch.dtype
) -> Iterator[Case]:
    """Every operator at the sizes of the dense model in `folder`; MoE at those of a comparable model."""
    facts, config = read_model_facts(folder), read_json(folder / "config.json")
    sizes = Sizes.of(facts, int(config["intermediate_size"]), device, dtype)
    batches = [num for num in tokens if num <= _MAX_BATCH]
    experts = _EXPERTS if facts.hidden_size >= _EXPERTS[2] else (8, 2, facts.hidden_size, sizes.intermediate)
    return chain(
        row_cases(sizes, tokens),
        gemm_cases(sizes, tokens),
        attention_cases(sizes, batches, contexts),
        step_cases(sizes, tokens, batches),
        moe_cases(tokens, *experts),
    )


def serving_dtype(device: str) -> torch.dtype:
    """The dtype a model is served in on this device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def run_kernels(
    report: Report,
    cases: Iterable[Case],
    device: str,
    dtype: torch.dtype,
    only: str | None = None,
    after_each: Callable[[], None] = lambda: None,
) -> None:
    """A row for each case whose name matches `only`. A failed case has a row with its error."""
    rates = measure_rates(device, dtype)
    report.device = device_name(device)
    report.settings |= {
        "dtype": str(dtype).removeprefix("torch."),
        "copy GB/s": round(rates.bytes_per_s / 1e9, 1),
        "matmul TFLOP/s": round(rates.flops / 1e12, 3),
    }
    for case in cases:
        if only is None or re.search(only, case.operator):
            report.add(**measure(case, device, dtype, rates))
            after_each()


def measure(case: Case, device: str, dtype: torch.dtype, rates: Rates) -> dict[str, Any]:
    """The row of one case."""
    row: dict[str, Any] = {"kernel": case.operator, "shape": case.shape}
    num_bytes, flops = case.cost
    num_copies = min(_MAX_COPIES, max(1, -(-_SPREAD_BYTES // num_bytes))) if device == "cuda" else 1
    try:
        copies = [case.build(device, dtype) for _ in range(num_copies)]
        seconds = seconds_per_call([copy.ours for copy in copies], device)
    except Exception as error:  # one failure must not hide the other rows
        return row | {"note": f"{type(error).__name__}: {error}"[:100]}
    row |= {
        "us": seconds * 1e6,
        "GB/s": num_bytes / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12,
        "of limit": max(num_bytes / rates.bytes_per_s, flops / rates.flops) / seconds,
    }
    for name in copies[0].peers:
        try:
            row[f"{name} us"] = seconds_per_call([copy.peers[name] for copy in copies], device) * 1e6
        except Exception as error:  # a peer that refuses a shape
            row["note"] = f"{name}: {type(error).__name__}: {error}"[:100]
    peers = [row[f"{name} us"] for name in copies[0].peers if f"{name} us" in row]
    return row | ({"best peer / ours": min(peers) / row["us"]} if peers else {})
