"""Plans to send, and exact comparison of what came."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from shoal.replicas.plan import DEVICE_TOKEN, StepPlan


def decode_plan(step: int, num_sequences: int = 4) -> StepPlan:
    """A step in which every sequence decodes one token, and one in 16 begins a new block."""
    rows = np.arange(num_sequences, dtype=np.int32)
    new = rows[: num_sequences // 16]
    return StepPlan(
        step,
        rows,
        rows * 7 + 100,
        np.ones_like(rows),
        np.full_like(rows, DEVICE_TOKEN),
        rows,
        rows,
        new,
        new + 3,
        new * 5,
    )


def same(left: Any, right: Any) -> bool:
    """Whether two messages are equal, with the types, shapes and bits of their arrays."""
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and left.tobytes() == right.tobytes()
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if dataclasses.is_dataclass(left):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in dataclasses.fields(left))
    return left == right
