"""The commands of `shoal bench`; measuring modules are imported once the options are known."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from .report import Report

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure engine, kernels and server.")

Model = Annotated[str, typer.Option(help="1b, 8b, 70b, 70b-half (shapes, random weights), tiny, a folder or a hub id.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="An engine setting as `serve` has it: name=value.")]
Json = Annotated[Path, typer.Option("--json", help="Where the figures go; its name is the report's.")]
Commit = Annotated[str | None, typer.Option(help="The commit to note, where there is no checkout to read it from.")]
Trace = Annotated[Path | None, typer.Option(help="Write a torch profiler trace of some steps, and show its figures.")]


@app.callback()
def _say_what_is_done() -> None:
    """Log the engine's start-up stages to the terminal."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("shoal").setLevel(logging.INFO)


def numbers(text: str) -> list[int]:
    """Parse a list such as 1,32,256."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,32") from None
    if min(values) < 1:
        raise typer.BadParameter(f"{text!r} holds a number below 1")
    return values


@app.command()
def latency(
    model: Model = "8b",
    batches: Annotated[str, typer.Option(help="Sequences that decode together.")] = "1,32,128,256",
    contexts: Annotated[str, typer.Option(help="Prompt tokens of each.")] = "1024",
    decoded: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    settings: Settings = None,
    trace: Trace = None,
    json: Json = Path("bench_latency.json"),
    commit: Commit = None,
) -> None:
    """Milliseconds of a decode step and prompt tokens a second, by batch and context."""
    from .engines import open_engine, parse_settings
    from .offline import run_latency

    report = new_report(json, commit, model=model, rounds=rounds)
    batch_list, context_list = numbers(batches), numbers(contexts)
    with open_engine(model, parse_settings(settings or [])) as opened:
        run_latency(
            report,
            opened,
            batch_list,
            context_list,
            num_decoded=decoded,
            rounds=rounds,
            trace=trace,
            after_each=lambda: report.keep(json),
        )
    finish(report, json)


@app.command()
def throughput(
    model: Model = "8b",
    requests: Annotated[int, typer.Option(min=1)] = 1000,
    shortest: Annotated[int, typer.Option(min=1, help="Tokens, of prompts and of answers.")] = 100,
    longest: Annotated[int, typer.Option(min=1, help="Tokens, of prompts and of answers.")] = 1024,
    settings: Settings = None,
    trace: Trace = None,
    json: Json = Path("bench_throughput.json"),
    commit: Commit = None,
) -> None:
    """Output tokens a second of many requests of mixed lengths, submitted at once."""
    from .engines import open_engine, parse_settings
    from .offline import run_throughput

    report = new_report(json, commit, model=model, shortest=shortest, longest=longest)
    with open_engine(model, parse_settings(settings or [])) as opened:
        run_throughput(
            report,
            opened,
            num_requests=requests,
            lengths=(shortest, longest),
            trace=trace,
            after_each=lambda: report.keep(json),
        )
    finish(report, json)


def new_report(path: Path, commit: str | None, **settings: object) -> Report:
    """An empty report, named as its file is."""
    report = Report(path.stem, settings=settings)
    if commit is not None:
        report.commit = commit
    return report


@app.command()
def serve(
    url: Annotated[str, typer.Option(help="Of a running server with the OpenAI API.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="As clients name it; the server's first if absent.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests at a time, such as 1,64,256.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Poisson arrivals a second, in its place.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Per row; four for each at a time if absent.")] = None,
    prompt_len: Annotated[int, typer.Option(min=1, help="Tokens.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each answer.")] = 128,
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts are random ids below it.")] = 1000,
    ttft_ms: Annotated[float | None, typer.Option(help="Goodput: longest time to the first token.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Goodput: longest time per output token.")] = None,
    e2e_ms: Annotated[float | None, typer.Option(help="Goodput: longest time to the last token.")] = None,
    json: Json = Path("bench_serve.json"),
    commit: Commit = None,
) -> None:
    """Latencies, output tokens a second and goodput of a server, over HTTP."""
    from . import serving
    from .http_client import Target

    if concurrency is not None and rate is not None:
        raise typer.BadParameter("--concurrency and --rate exclude each other")
    target = Target.of(url, model or serving.first_model(url, api_key), api_key)
    shape = serving.Shape(prompt_len, new_tokens, vocab_size)
    objectives = serving.Objectives(ttft_ms, tpot_ms, e2e_ms)
    report = new_report(json, commit, model=target.model, prompt_len=prompt_len, new_tokens=new_tokens)
    report.settings |= {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "e2e_ms": e2e_ms}
    serving.warm_up(target, shape)
    if rate is not None:
        report.add(**serving.measure(target, shape, requests or 100, rate=rate, objectives=objectives))
    else:
        for at_a_time in numbers(concurrency or "1,64,256"):
            num_requests = requests or max(16, 4 * at_a_time)
            report.add(**serving.measure(target, shape, num_requests, concurrency=at_a_time, objectives=objectives))
            report.keep(json)
    finish(report, json)


@app.command()
def kernels(
    model: Model = "8b",
    tokens: Annotated[str, typer.Option(help="Rows of a step; up to 256 of them also decode.")] = "1,32,256,4096",
    contexts: Annotated[str, typer.Option(help="Of attention.")] = "1024,8192",
    only: Annotated[str | None, typer.Option(help="A regular expression of kernels' names.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Json = Path("bench_kernels.json"),
    commit: Commit = None,
) -> None:
    """Microseconds, GB/s and TFLOP/s of every operator at a dense model's sizes, and its share of the limit."""
    from ...replicas.device import choose_device
    from .kernels import cases_of, run_kernels, serving_dtype
    from .shapes import open_model

    report = new_report(json, commit, model=model)
    token_list, context_list, chosen = numbers(tokens), numbers(contexts), choose_device(device)
    dtype = serving_dtype(chosen)
    with open_model(model) as (folder, _):
        cases = cases_of(folder, token_list, context_list, chosen, dtype)
        run_kernels(report, cases, chosen, dtype, only, after_each=lambda: report.keep(json))
    finish(report, json)


def finish(report: Report, path: Path) -> None:
    report.show()
    typer.echo(f"written to {report.write(path)}")
