"""Settings that every test shares. They are made before torch, triton or ray are imported anywhere."""

from __future__ import annotations

import os

# One thread: the machine's cores are shared with the actors that tests start, and sums then have one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing here may reach a hub, and Ray runs on loopback without tokens.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # Triton reads it when a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

# Shared machines make any deadline a coin toss. CI is the same on every run; at a desk, examples vary;
# `make test-thorough` takes its time.
_COMMON = {"deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **_COMMON)
settings.register_profile("desk", **_COMMON)
settings.register_profile("thorough", max_examples=3000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "desk"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a device, tests that are marked gpu are skipped, also where only some of their parameters are."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
