"""The `shoal` command. torch and Ray are imported once the configuration has been checked."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from ..replicas.errors import ConfigError, ModelError, ServingError
from .bench.commands import app as bench_app
from .cli_config import plan, read_options, serve_config
from .cli_options import given_options, with_serve_options
from .config import ModelPlan
from .doctor.command import doctor
from .environment import prepare_environment
from .resources import check_gpus, resources_here
from .server.supervisor import interrupt_on_signals, say, under_supervisor

EXIT_CONFIG = 2

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors in one line, not in a box
    help="Serve large language models.",
)
app.add_typer(bench_app, name="bench")
app.command()(doctor)


@app.callback()
def _shoal() -> None:
    """Keep `serve` a subcommand."""


@app.command()
def version() -> None:
    """Print Shoal's version."""
    from .. import __version__

    print(__version__)


@app.command()
@with_serve_options
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a Hugging Face id, or tiny, the model in the package.")],
    **options: Any,
) -> None:
    """Serve MODEL with the OpenAI API until Ctrl-C or SIGTERM."""
    settings = {"model": model, **given_options(context, options)}
    path = settings.pop("config", None)
    folder = under_supervisor()
    try:
        if path is not None:
            settings = read_options(path) | settings
        _serve(settings, folder)
    except KeyboardInterrupt:
        say("shoal: stopped")
        # All is stopped. An interrupted start may leave threads of Ray, and finalizing the interpreter around them has
        # crashed.
        os._exit(0)


def _serve(settings: dict[str, Any], folder: Path) -> None:
    begin = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        server, config = serve_config(settings)
        plans = plan(config)
    host, address = server.host, server.address
    if address is None:
        check_gpus(plans, resources_here(), "this machine")
    for warning in caught:
        print(f"shoal: warning: {warning.message}", file=sys.stderr)
    port = free_port(host, server.port)
    prepare_environment(host, own_ray=address is None)

    # The configuration is valid: Ray may start.
    from .server.banner import banner
    from .server.launcher import Endpoint, application, ray_cluster, replicas_of

    endpoint = Endpoint(host, port, config.api_keys[0] if config.api_keys else None)
    print(f"shoal: starting {plans[0].name} from {plans[0].folder}", flush=True)
    with ray_cluster(address, folder):
        interrupt_on_signals()  # again: Ray has replaced the SIGTERM handler
        ray_started = time.monotonic()
        if address is not None:
            _warn_of_missing_gpus(plans)
        with application(config, plans, endpoint, joined=address is not None):
            now = time.monotonic()
            stages = f"Ray {ray_started - begin:.1f} s, Serve and models {now - ray_started:.1f} s"
            print(f"shoal: started in {now - begin:.1f} s: {stages}", flush=True)
            print(banner(endpoint, config, replicas_of(plans)), flush=True)
            threading.Event().wait()


def _warn_of_missing_gpus(plans: list[ModelPlan]) -> None:
    """Warn, and go on: a node that joins the Ray cluster later may have the GPUs."""
    from .app import cluster_resources

    try:
        check_gpus(plans, cluster_resources(), "the Ray cluster")
    except ConfigError as error:
        print(f"shoal: warning: {error.message}; the model waits until there are as many", file=sys.stderr)


def free_port(host: str, port: int) -> int:
    """Return `port`, or a free one for 0. Raises ConfigError if it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0).lower()}; choose another --port"
            ) from error
        return probe.getsockname()[1]


def main() -> None:
    """Entry point of the `shoal` command. An error that a user can mend is one line."""
    # SIGTERM unwinds as Ctrl-C does, so that child processes and temporary files are removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        app()
    except ServingError as error:
        print(f"shoal: error: {error.message}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"shoal: {note}", file=sys.stderr)
        sys.exit(EXIT_CONFIG if isinstance(error, ConfigError | ModelError) else 1)


if __name__ == "__main__":
    main()
