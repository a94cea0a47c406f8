"""Choose the kernel and launch of each small-batch GEMM on this GPU: the table that kernels/tuning.py reads.

    python -m benchmarks.tune [8b 1b 8b/2 70b/4 ...] [--budget SECONDS]

8b/2 is one of two ranks that share the 8B model. Other shapes of the table are kept, as are those not reached.

Candidates are timed against cuBLAS in CUDA graphs. Each GEMM follows the kernel before it in a model (norm, or
attention of one token), so that overlap with it counts. Weights rotate through 240 MB, so that the L2 cache holds
none. Before timing, one process per core compiles the candidates and checks them against the fp32 formula. If none is
1 % faster than cuBLAS, the table says cuBLAS. The table goes to kernels/tuned/<device>.json, the times to
benchmarks/results/tune.json: microseconds of the choice and of cuBLAS, by tokens, including the kernel before.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import triton

from benchmarks.report import RESULTS, Report
from shoal.kernels.attention.paged_decode import decode_tables, paged_decode
from shoal.kernels.linear.gemm import gated_linear_ref, linear_ref
from shoal.kernels.linear.gemm_triton import gemm_triton
from shoal.kernels.linear.rms_norm import rms_norm
from shoal.kernels.linear.silu_mul import silu_mul
from shoal.kernels.tuning import TABLES, TOKEN_BUCKETS, Launch, format_table, parse_table, shape_key, table_name

ROTATED_BYTES = 240_000_000  # four times the L2 cache of an H200
CONTEXT = 1024
SHARED_MEMORY = 227 * 1024
MARGIN = 0.99
STREAM_HANDICAP = 1.015  # the Gluon kernel must win by more than noise: the interpreter cannot run it


# (block_n, block_m, num_warps, num_stages, splits) for up to 64 tokens, and for more
TILES = (
    (
        (64, 64, 4, 6, (1, 2, 4)), (64, 64, 4, 10, (1, 2)), (64, 128, 4, 3, (1, 2, 4)),
        (64, 128, 4, 4, (1, 2, 3, 4)), (64, 128, 4, 6, (1, 2)), (64, 256, 4, 3, (1, 2, 4)), (64, 256, 4, 4, (1, 2)),
        (128, 64, 4, 4, (1, 2, 3, 4, 8)), (128, 64, 4, 8, (1, 2, 4)), (128, 64, 8, 6, (1, 2, 4)),
        (128, 128, 4, 3, (1, 2, 4)), (128, 128, 8, 4, (1, 2, 4)),
    ),
    (
        (64, 64, 4, 4, (1, 2, 4)), (64, 64, 4, 5, (1, 2)), (64, 64, 8, 4, (1, 2)), (64, 128, 4, 3, (1, 2)),
        (128, 64, 4, 4, (1, 2, 4)), (128, 64, 8, 4, (1, 2, 4)), (128, 64, 8, 5, (1, 2, 4)), (256, 64, 8, 3, (1, 2, 4)),
    ),
)  # fmt: skip


class Model(NamedTuple):
    """Sizes that determine a model's GEMM shapes."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


MODELS = {
    "8b": Model(4096, 32, 8, 128, 14336, 128256),  # Llama 3.1 8B
    "1b": Model(2048, 32, 8, 64, 8192, 128256),  # Llama 3.2 1B
    "70b": Model(8192, 64, 8, 128, 28672, 128256),  # Llama 3.1 70B
}


class Shape(NamedTuple):
    """A GEMM: outputs (after the gate, if any), inputs, and the kernel before it."""

    outputs: int
    inputs: int
    gated: bool = False
    after: str = "norm"  # or attention, or product

    @property
    def rows(self) -> int:
        return self.outputs * (2 if self.gated else 1)


def shapes_of(which: str) -> list[Shape]:
    """GEMMs of a decoder layer and the output head of a model (`8b`) or of one of its ranks
    (`8b/2`).

    Raises ValueError for an unknown model.
    """
    name, _, ranks = which.partition("/")
    if name not in MODELS or not (ranks or "1").isdecimal():
        raise ValueError(f"{which!r} is not one of {', '.join(MODELS)}, optionally with a number of ranks: 8b/2")
    model, tp = MODELS[name], int(ranks or 1)
    queries, keys = model.heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp
    return [
        Shape(queries + 2 * keys, model.hidden),
        Shape(model.hidden, queries, after="attention"),
        Shape(model.intermediate // tp, model.hidden, gated=True),
        Shape(model.hidden, model.intermediate // tp, after="product"),
        Shape(-(-model.vocab // tp), model.hidden),
    ]


def candidates(shape: Shape, num_tokens: int) -> Iterator[Launch]:  # noqa: C901 -- one nest of loops over launches
    if num_tokens == 1:
        for block_n, num_warps in ((1, 4), (2, 4), (4, 4), (8, 4), (4, 8), (2, 8), (4, 2), (8, 2), (8, 1)):
            block_m = 256 * num_warps
            rest = shape.inputs - block_m
            if rest < 0:
                continue
            # Attention of one sequence leaves the memory idle: time to prefetch more than the first
            # tile.
            for prefetch in {0, min(1024, rest), rest} if shape.after == "attention" else {0}:
                yield Launch("fma", block_n, 1, block_m, num_warps=num_warps, prefetch=prefetch)
        return
    for block_t in (128, 256) if num_tokens > 128 else (max(16, num_tokens),):
        for block_n, block_m, num_warps, num_stages, all_splits in TILES[num_tokens > 64]:
            size = (block_n * (2 if shape.gated else 1) + block_t) * block_m * 2 * num_stages
            sums = block_n * block_t * (2 if shape.gated else 1) // (32 * num_warps)
            if size > SHARED_MEMORY or sums > 128:
                continue
            num_tiles = -(-shape.outputs // block_n) * -(-num_tokens // block_t)
            for splits in all_splits:
                if splits == 1 or num_tiles * splits <= 528:  # four per SM: enough parallelism
                    for kernel in ("mma", "stream") if num_tokens <= 64 else ("mma",):
                        yield Launch(kernel, block_n, block_t, block_m, splits, num_warps, num_stages)


def compile_and_check(job: tuple[Launch, bool]) -> tuple[Launch, bool, str]:
    """Run one launch on a small GEMM. Returns an error text, empty if the result is right."""
    launch, gated = job
    torch.manual_seed(0)
    num_tokens = 1 if launch.kernel == "fma" else launch.block_t + 3
    x = torch.randn(num_tokens, 2048, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(272 * (2 if gated else 1), 2048, dtype=torch.bfloat16, device="cuda") / 2048**0.5
    try:
        got = gemm_triton(x, weight, None, "silu" if gated else None, launch)
    except Exception as error:  # a launch that exceeds the device's limits is no candidate
        return launch, gated, f"{type(error).__name__}: {error}"
    want = gated_linear_ref(x, weight) if gated else linear_ref(x, weight)
    close = torch.allclose(got.float(), want.float(), rtol=2e-2, atol=2e-2)
    return launch, gated, "" if close else "wrong result"


def microseconds(run: Callable[[int], object], inner: int) -> float:
    """Median time of one of `inner` runs in a CUDA graph."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(inner):
            run(i)
    graph.replay()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(7)]
    for first, last in pairs:
        first.record()
        graph.replay()
        last.record()
    torch.cuda.synchronize()
    return median(first.elapsed_time(last) for first, last in pairs) * 1e3 / inner


class Tuner:
    """Times GEMMs on one GPU, with weights cut from one large tensor."""

    def __init__(self, shapes: list[Shape]) -> None:
        largest = max(shape.rows * shape.inputs for shape in shapes)
        numel = max(ROTATED_BYTES // 2, largest) * 2
        self._pool = torch.empty(numel, dtype=torch.bfloat16, device="cuda").normal_().mul_(0.02)

    def measure(self, shape: Shape, num_tokens: int, launches: list[Launch]) -> tuple[float, dict[Launch, float]]:
        """Microseconds of cuBLAS and of each launch, including the kernel before the GEMM."""
        numel = shape.rows * shape.inputs
        copies = max(1, min(self._pool.numel() // numel, -(-ROTATED_BYTES // (2 * numel))))
        weights = self._pool[: copies * numel].view(copies, shape.rows, shape.inputs)
        inner = copies * max(1, 6 // copies)
        inputs = kernel_before(shape, num_tokens)

        def cublas(i: int) -> torch.Tensor:
            y = torch.nn.functional.linear(inputs(), weights[i % copies])
            return silu_mul(y, "silu") if shape.gated else y

        def ours(launch: Launch, i: int) -> torch.Tensor:
            return gemm_triton(inputs(), weights[i % copies], None, "silu" if shape.gated else None, launch)

        times = {launch: microseconds(lambda i, launch=launch: ours(launch, i), inner) for launch in launches}
        return microseconds(cublas, inner), times


def kernel_before(shape: Shape, num_tokens: int) -> Callable[[], torch.Tensor]:
    hidden = torch.randn(num_tokens, shape.inputs, dtype=torch.bfloat16, device="cuda")
    if shape.after == "product":
        return lambda: hidden
    if shape.after == "norm" or num_tokens > 1:  # attention of more tokens keeps the memory busy, without overlap
        scale = torch.ones(shape.inputs, dtype=torch.bfloat16, device="cuda")
        return lambda: rms_norm(hidden, scale, 1e-6)
    num_heads, head_dim, block_size = max(1, shape.inputs // 128), min(128, shape.inputs), 64
    num_kv_heads, num_blocks = max(1, num_heads // 4), CONTEXT // block_size
    cache = torch.zeros(num_blocks, 2, num_kv_heads, block_size, head_dim, dtype=torch.bfloat16, device="cuda")
    cache.normal_()
    tables = decode_tables(
        torch.tensor([CONTEXT], dtype=torch.int32, device="cuda"),
        torch.arange(num_blocks, dtype=torch.int32, device="cuda")[None],
        num_kv_heads=num_kv_heads, block_size=block_size, window=None,
    )  # fmt: skip
    queries = hidden.view(1, num_heads, head_dim)
    out = torch.empty_like(queries)

    def attention() -> torch.Tensor:
        paged_decode(queries, cache, tables, scale=head_dim**-0.5, out=out)
        return out.view(1, shape.inputs)

    return attention


def compiled(jobs: set[tuple[Launch, bool]]) -> set[tuple[Launch, bool]]:
    """Launches that compile and are correct; prints the others."""
    with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 2)) as pool:
        results = pool.map_async(compile_and_check, sorted(jobs, key=str), chunksize=1).get(timeout=1 + 5 * len(jobs))
    for launch, gated, trouble in results:
        if trouble:
            print(f"tune: left out {launch} gated={gated}: {trouble.splitlines()[0][:120]}")
    return {(launch, gated) for launch, gated, trouble in results if not trouble}


def tune(shapes: list[Shape], budget: float, report: Report) -> dict[str, dict[int, Launch | None]]:
    """The choice for each shape and bucket. Prints and leaves out shapes that `budget` seconds do not reach."""
    end = time.monotonic() + budget
    plan = {(shape, bucket): list(candidates(shape, bucket)) for shape in shapes for bucket in TOKEN_BUCKETS}
    good = compiled({(launch, shape.gated) for (shape, _), launches in plan.items() for launch in launches})
    tuner, chosen = Tuner(shapes), {}
    for shape in shapes:
        if time.monotonic() > end:
            print(f"tune: no time left for {shape}")
            continue
        by_bucket = chosen[shape_key(shape.outputs, shape.inputs, shape.gated)] = {}
        row = {}
        for bucket in TOKEN_BUCKETS:
            launches = [launch for launch in plan[shape, bucket] if (launch, shape.gated) in good]
            cublas, times = tuner.measure(shape, bucket, launches)
            best = min(times, key=lambda each: times[each] * (STREAM_HANDICAP if each.kernel == "stream" else 1))
            by_bucket[bucket] = best if times[best] < MARGIN * cublas else None
            row[f"{bucket}"] = f"{times[best]:.1f} / {cublas:.1f}"
        report.add(outputs=shape.outputs, inputs=shape.inputs, gated="yes" if shape.gated else "no", **row)
    return chosen


def merged(path: Path, device: str, chosen: dict[str, dict[int, Launch | None]]) -> str:
    """The text of table `path`, updated with the chosen shapes."""
    before = parse_table(json.loads(path.read_text("utf-8"))) if path.is_file() else {}
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return format_table(device, versions, before | chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["8b", "1b", "8b/2", "70b/4"])
    parser.add_argument("--budget", type=float, default=600, help="seconds")
    parser.add_argument("--table", type=Path, help="the table; by default what kernels/tuning.py reads")
    parser.add_argument("--results", type=Path, default=RESULTS / "tune.json")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    report = Report(arguments.results.stem, device=device, settings={"models": arguments.models})
    shapes = [shape for which in arguments.models for shape in shapes_of(which)]
    with torch.inference_mode():
        chosen = tune(list(dict.fromkeys(shapes)), arguments.budget, report)
    table = arguments.table or TABLES / table_name(device)
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(merged(table, device, chosen), "utf-8")
    report.write(arguments.results)
    report.show()


if __name__ == "__main__":
    main()
