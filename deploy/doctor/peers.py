"""Peer access: whether each GPU reads the others' memory without the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .finding import Finding, Status


def findings(copies: Mapping[tuple[int, int], Mapping[str, Any]]) -> list[Finding]:
    """Findings about ordered pairs; none without a pair."""
    if not copies:
        return []
    apart = [pair for pair, line in copies.items() if not line["access"]]
    rates = [line["bytes_per_s"] / 1e9 for line in copies.values()]
    figures = {f"{source}-{target}": round(rate, 1) for (source, target), rate in zip(copies, rates, strict=True)}
    speed = f"a copy runs at {min(rates):.1f} to {max(rates):.1f} GB/s"
    if not apart:
        return [
            Finding("peer access", Status.OK, f"all {len(copies)} pairs reach each other; {speed}", figures=figures)
        ]
    named = ", ".join(f"{source} to {target}" for source, target in apart)
    return [
        Finding(
            "peer access",
            Status.WARNING,
            f"{len(apart)} of {len(copies)} pairs of GPUs do not reach each other: {named}; {speed}",
            "their exchanges go through host memory: keep the ranks of a model on GPUs that reach each other "
            "(CUDA_VISIBLE_DEVICES), or take --all-reduce nccl; in a virtual machine, pass the GPUs' switch through "
            "and turn ACS off",
            figures,
        )
    ]
