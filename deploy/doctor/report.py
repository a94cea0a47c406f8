"""Findings as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .finding import Finding, Status

_STYLES = {Status.OK: "green", Status.SKIPPED: "dim", Status.WARNING: "yellow", Status.WRONG: "bold red"}
_NARROWEST = 100


def exit_status(findings: Sequence[Finding]) -> int:
    return int(any(finding.status is Status.WRONG for finding in findings))


def waiting() -> AbstractContextManager[object]:
    """A spinner on terminals: probes take seconds to start."""
    return Console(stderr=True).status("looking at this machine")


def show(findings: Sequence[Finding]) -> None:
    """The table, with remedies below their findings."""
    console = Console(highlight=False)
    if console.width < _NARROWEST and not console.is_terminal:
        console = Console(highlight=False, width=_NARROWEST)  # a pipe has no width; lines are not cut for it
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold")
    for name in ("check", "", "finding"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        text = Text(finding.message)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="italic")
        table.add_row(finding.check, Text(finding.status.value, style=_STYLES[finding.status]), text)
    console.print(table)
    console.print(f"\n{summary(findings)}")


def summary(findings: Sequence[Finding]) -> str:
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    parts = [f"{count} {status.value}" for status, count in counts.items() if count]
    return ", ".join(parts)


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps(
        {
            "ok": exit_status(findings) == 0,
            "findings": [finding.as_dict() for finding in findings],
        },
        indent=2,
    )
