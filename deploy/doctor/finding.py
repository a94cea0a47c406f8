"""What a check has found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Status(Enum):
    OK = "ok"
    SKIPPED = "skipped"  # it could not be checked here
    WARNING = "warning"  # models are served, but slower than they could be, or not for long
    WRONG = "wrong"  # models that need it do not start


@dataclass(frozen=True, slots=True)
class Finding:
    """`message` says what was found, with the numbers; `remedy` what to change. `figures` are for programs."""

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
