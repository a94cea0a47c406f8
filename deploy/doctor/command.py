"""`shoal doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path | None, typer.Option(help="A file for `serve run`: does what it asks for fit?")]
Address = Annotated[str, typer.Option(help="Of a Ray; auto finds one on this machine, none looks for none.")]


def doctor(
    config: Config = None,
    address: Address = "auto",
    host: Annotated[
        str | None, typer.Option(help="Where the server is to listen; as in the file, or loopback.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="As in the file, or 8000.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds for each process that looks at something.")] = 120.0,
) -> None:
    """Check whether models can start here, and run at full speed. Exits with 1 if something is wrong."""
    from . import report
    from .run import Subject, examine

    with report.waiting():
        findings = list(examine(Subject(config, address, host, port, limit)))
    if as_json:
        typer.echo(report.as_json(findings))
    else:
        report.show(findings)
    raise typer.Exit(report.exit_status(findings))
