"""The `shoal` command. Nothing heavy is imported before the configuration has been checked."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..replicas.errors import ConfigError, ModelError, ServingError
from .bench.commands import app as bench_app
from .doctor.command import doctor
from .environment import prepare_environment
from .server.supervisor import interrupt_on_signals, say, under_supervisor

if TYPE_CHECKING:
    from .config import ModelPlan

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
    """Keeps `serve` a command of its own."""


@app.command()
def version() -> None:
    """Print Shoal's version."""
    from .. import __version__

    print(__version__)


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="A folder, a Hugging Face id, or tiny, the model that comes along.")],
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(envvar="SHOAL_API_KEY", help="May be repeated.")] = None,
    admin_key: Annotated[list[str] | None, typer.Option(envvar="SHOAL_ADMIN_KEY", help="May be repeated.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name that clients use; MODEL if absent.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Where the tokenizer is, if not in MODEL.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face id.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context, in tokens.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in a step.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in a step.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a KV block.")] = None,
    num_gpu_blocks_override: Annotated[int | None, typer.Option(help="KV blocks, on CPU too.")] = None,
    gpu_memory_utilization: Annotated[float | None, typer.Option(help="Share of the GPU's memory.")] = None,
    kv_cache_memory_bytes: Annotated[int | None, typer.Option(help="Memory of the KV cache.")] = None,
    enable_prefix_caching: Annotated[
        bool | None, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching")
    ] = None,
    enable_chunked_prefill: Annotated[
        bool | None, typer.Option("--enable-chunked-prefill/--no-enable-chunked-prefill")
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help="Ranks that split every layer.")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "-pp", help="Stages that split the stack of layers.")
    ] = None,
    all_reduce: Annotated[str | None, typer.Option(help="Over GPUs: auto, nccl, symm_mem or triton.")] = None,
    quantized_all_reduce: Annotated[
        bool | None,
        typer.Option("--quantized-all-reduce/--no-quantized-all-reduce", help="Large sums over GPUs as int8."),
    ] = None,
    disable_custom_all_reduce: Annotated[
        bool | None, typer.Option("--disable-custom-all-reduce", help="The same as --all-reduce nccl.")
    ] = None,
    distributed_executor_backend: Annotated[str | None, typer.Option(hidden=True)] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", "-q")] = None,
    seed: Annotated[int | None, typer.Option(help="Of random weights; requests have their own.")] = None,
    load_format: Annotated[str | None, typer.Option(help="auto, safetensors, or dummy: random weights.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Torch threads of a replica on CPU.")] = None,
    enforce_eager: Annotated[
        bool | None,
        typer.Option("--enforce-eager/--no-enforce-eager", help="No CUDA graphs: starts sooner, runs slower."),
    ] = None,
    batch_invariant: Annotated[
        bool | None,
        typer.Option("--batch-invariant/--no-batch-invariant", help="The same bits in any batch; slower."),
    ] = None,
    step_limit_s: Annotated[
        float | None, typer.Option(help="Seconds that a step may always take; one of more may count as stuck.")
    ] = None,
    num_replicas: Annotated[int | None, typer.Option(help="Copies of the model.")] = None,
    group_start_timeout_s: Annotated[
        float | None, typer.Option(help="Seconds for the ranks of a replica to start and load the model.")
    ] = None,
    num_routers: Annotated[int | None, typer.Option(help="HTTP processes in front of them.")] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray to join; without it one is started.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML of these options, named as here; flags win.")] = None,
) -> None:
    """Serve MODEL with the OpenAI API until Ctrl-C or SIGTERM."""
    given = {name: value for name, value in locals().items() if name not in ("context", "config") and value is not None}
    defaults = {name for name in given if _is_default(context, name)}
    folder = under_supervisor()
    try:
        _serve(_merge(given, defaults, config), folder)
    except KeyboardInterrupt:
        say("shoal: stopped")
        # All is stopped. Threads of Ray's may be left where a start was interrupted, and an interpreter that is taken
        # down around them has crashed.
        os._exit(0)


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


def _merge(given: dict[str, Any], defaults: set[str], path: Path | None) -> dict[str, Any]:
    """The flags over the file's settings over the defaults."""
    if path is None:
        return given
    from .cli_config import read_options

    return {**{name: given[name] for name in defaults}, **read_options(path), **_without(given, defaults)}


def _without(values: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _serve(settings: dict[str, Any], folder: Path) -> None:
    from .cli_config import plan, serve_config
    from .resources import check_gpus, room_here

    begin = time.monotonic()
    host, address = settings["host"], settings.get("address")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = serve_config(settings)
        plans = plan(config)
    if address is None:
        check_gpus(plans, room_here(), "this machine")
    for warning in said:
        print(f"shoal: warning: {warning.message}", file=sys.stderr)
    port = free_port(host, settings["port"])
    prepare_environment(host, own_ray=address is None)

    # Everything that can be wrong with the configuration is known by now: Ray may start.
    from .server.banner import banner
    from .server.launcher import Endpoint, application, ray_cluster, replicas_of

    endpoint = Endpoint(host, port, config.api_keys[0] if config.api_keys else None)
    print(f"shoal: starting {plans[0].name} from {plans[0].folder}", flush=True)
    with ray_cluster(address, folder):
        interrupt_on_signals()  # once more: Ray has put a handler of SIGTERM in the place of ours
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
    """Of a Ray that was joined: a node that joins it later may bring them."""
    from .app import cluster_room
    from .resources import check_gpus

    try:
        check_gpus(plans, cluster_room(), "the Ray cluster")
    except ConfigError as error:
        print(f"shoal: warning: {error.message}; the model waits until there are as many", file=sys.stderr)


def free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, a free one for 0. Raises ConfigError if it is taken."""
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
    """Entry point of the `shoal` command: what users can put right is told in one line."""
    # Whoever is asked to end ends what it has started, and removes what it has written, as after Ctrl-C.
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
