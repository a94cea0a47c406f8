"""Findings of checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Status(Enum):
    OK = "ok"
    SKIPPED = "skipped"  # cannot be checked here
    WARNING = "warning"  # models are served, but slowly or not reliably
    WRONG = "wrong"  # models that need it do not start


@dataclass(frozen=True, slots=True)
class Finding:
    """`message`: the finding with its numbers; `remedy`: what to change; `figures`: for programs."""

    check: str
    status: Status
    message: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "status": self.status.value,
            "message": self.message,
            "remedy": self.remedy,
            "figures": dict(self.figures),
        }


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
