"""Bandwidth between every pair of ranks: NCCL between GPUs, gloo between two processes otherwise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .finding import Finding, Status
from .process import Outcome, run_probes

_MESSAGE = {"nccl": 128 << 20, "gloo": 8 << 20}  # bytes
_SLOW = 0.5  # of the median pair, or of a plain copy
_REMEDY = {
    "nccl": "run with NCCL_DEBUG=INFO to see what it tries; docs/parallelism.md says which variables matter",
    "gloo": "ranks on the CPU meet on 127.0.0.1: it must be up, and no firewall may stand before it",
}


def check_pairs(num_gpus: int, copies: Mapping[tuple[int, int], Mapping[str, Any]], limit_s: float) -> list[Finding]:
    """Findings from one process a GPU, or from two CPU processes if there is no pair of GPUs."""
    backend, device, ranks = ("nccl", "cuda", num_gpus) if num_gpus > 1 else ("gloo", "cpu", 2)
    with tempfile.TemporaryDirectory(prefix="shoal-doctor-") as folder:
        rendezvous = str(Path(folder) / "store")
        arguments = [[str(rank), str(ranks), device, rendezvous, str(_MESSAGE[backend])] for rank in range(ranks)]
        outcomes = run_probes("probe_pair", arguments, limit_s=limit_s)
    return findings(backend, ranks, outcomes, {pair: line["bytes_per_s"] for pair, line in copies.items()})


def findings(
    backend: str, ranks: int, outcomes: Sequence[Outcome], copies: Mapping[tuple[int, int], float]
) -> list[Finding]:
    """Findings from the ranks' answers. copies: bytes a second of a plain copy, by pair."""
    lines = [line for outcome in outcomes for line in outcome.lines]
    pairs = {(line["source"], line["target"]): line for line in lines if "source" in line}
    whole = next((line for line in lines if "sum" in line), None)
    problems = _failures(backend, outcomes, lines, pairs, whole)
    damaged = [pair for pair, line in pairs.items() if not line["right"]]
    if damaged or (whole is not None and not whole["right"]):
        what = f"what came from {_named(damaged)} is not what was sent" if damaged else "a sum of all ranks is wrong"
        remedy = "do not serve on these devices: look for errors of memory and links (nvidia-smi -q, dmesg)"
        problems.append(Finding(backend, Status.WRONG, what, remedy))
    if backend == "nccl":
        problems += _slow(pairs, copies) + _symmetric(lines)
    if not pairs:
        return problems
    rates = [line["bytes_per_s"] / 1e9 for line in pairs.values()]
    figures = {f"{source}-{target}": round(rate, 2) for (source, target), rate in zip(pairs, rates, strict=True)}
    total = ranks * (ranks - 1)
    message = f"{len(pairs)} of {total} pairs exchanged tensors, at {min(rates):.2f} to {max(rates):.2f} GB/s"
    if whole is not None:
        figures["sum"] = round(whole["bytes_per_s"] / 1e9, 2)
        message += f"; a sum over all {ranks} moves {figures['sum']:.2f} GB/s"
    return [Finding(backend, Status.OK, message, figures=figures), *problems]


def _failures(
    backend: str,
    outcomes: Sequence[Outcome],
    lines: Sequence[Mapping[str, Any]],
    pairs: Mapping[tuple[int, int], Any],
    whole: Mapping[str, Any] | None,
) -> list[Finding]:
    """The first rank that failed, else the one that hung, with its last operation."""
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.failure is not None]
    if not failed:
        return []
    rank, outcome = next(((rank, one) for rank, one in failed if one.status is not None), failed[0])
    begun = [tuple(line["begin"]) for line in lines if isinstance(line.get("begin"), list)]
    open_pairs = [pair for pair in begun if pair not in pairs]
    if open_pairs:
        where = f"while {_named(open_pairs)} exchanged tensors"
    elif any(line.get("begin") == "sum" for line in lines) and whole is None:
        where = "in a sum over all ranks"
    else:
        where = "while the ranks met"
    message = f"rank {rank} of {len(outcomes)} failed {where}: {outcome.failure}"
    return [Finding(backend, Status.WRONG, message, _REMEDY[backend])]


def _slow(pairs: Mapping[tuple[int, int], Mapping[str, Any]], copies: Mapping[tuple[int, int], float]) -> list[Finding]:
    """Pairs far below the median, or below a plain copy of the same pair."""
    rates = {pair: line["bytes_per_s"] for pair, line in pairs.items()}
    if not rates:
        return []
    typical = median(rates.values())
    behind_others = [pair for pair, rate in rates.items() if rate < _SLOW * typical]
    behind_copies = [pair for pair, rate in rates.items() if rate < _SLOW * copies.get(pair, 0.0)]
    found = []
    if behind_others:
        slowest = min(rates[pair] for pair in behind_others) / 1e9
        message = f"{_named(behind_others)} reach {slowest:.1f} GB/s and the median pair {typical / 1e9:.1f}"
        remedy = "keep models off these GPUs (CUDA_VISIBLE_DEVICES), or look at their link: nvidia-smi topo -m"
        found.append(Finding("nccl", Status.WARNING, message, remedy))
    if behind_copies:
        pair = min(behind_copies, key=lambda one: rates[one] / copies[one])
        numbers = f"{rates[pair] / 1e9:.1f} GB/s, where a plain copy reaches {copies[pair] / 1e9:.1f}"
        message = f"NCCL does not use the links of {len(behind_copies)} pairs: {_named([pair])} has {numbers}"
        remedy = "unset NCCL_P2P_DISABLE and NCCL_P2P_LEVEL; run with NCCL_DEBUG=INFO to see what it takes"
        found.append(Finding("nccl", Status.WARNING, message, remedy))
    return found


def _symmetric(lines: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Whether kernels can all-reduce over symmetric memory."""
    answer = next((line for line in lines if "symmetric" in line), None)
    if answer is None:
        return []
    if answer["symmetric"]:
        return [Finding("symmetric memory", Status.OK, "the ranks write each other's memory")]
    remedy = "sums are left to NCCL, which is slower for small ones; docs/parallelism.md says what they need"
    return [Finding("symmetric memory", Status.WARNING, f"ranks cannot write each other's: {answer['reason']}", remedy)]


def _named(pairs: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(f"{pair[0]} to {pair[1]}" for pair in pairs)
