"""Run the steps of a model dry, as a GPU would run them, and compile some of the kernels.

python -m tests.support.dry_run FOLDER NUM_COMPILED -> JSON. In a process of its own: Triton must not interpret, and
its driver is replaced by one that only says what the device is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from shoal.kernels.backend import Backend, use_backend
from shoal.kernels.compiling import compile_triton
from shoal.kernels.compiling.compile_process import CompileProcess, Specialization
from shoal.kernels.compiling.compile_triton import compile_kernels, dry_run
from shoal.kernels.compiling.compile_worker_triton import compile_kernel
from shoal.kernels.linear.gemm_triton import gemm_triton
from shoal.kernels.sampling.params import SamplingRows
from shoal.kernels.sampling.sample import sample_rows
from shoal.kernels.tuning import Launch
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.models.loader import load_model
from shoal.replicas.worker import warmup
from shoal.replicas.worker.graphs import decode_shapes, mixed_shapes
from shoal.replicas.worker.shard import _make_runner

# fp32 products are torch's own: of a 16-bit model every kernel is seen.
DTYPE = "bfloat16"


class FakeDriver:
    """What Triton asks of a device before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def multiply() -> None:
    """Launch a product that is written in Gluon, which has a compiler of its own."""
    x, weight = (torch.empty(size, 256, dtype=torch.bfloat16) for size in (9, 64))
    gemm_triton(x, weight, None, "silu", Launch("stream", 64, 16, 64, splits=2, num_stages=2))


def hits_of_a_launch(launch: Callable[[], object]) -> list[bool]:
    """Whether what each kernel needs that Triton would launch, up to the launch itself, is in its cache."""
    hits: list[bool] = []

    def warm_up(self: JITFunction, grid: object) -> Callable[..., object]:
        def run(*args: object, **kwargs: object) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if hasattr(nvidia, "make_launcher"):  # which Triton makes of C at a launch, before 3.7
                before = num_launchers()
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
                hits.append(num_launchers() == before)

        return run

    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)  # pyright: ignore
    with compile_triton._replaced(JITFunction, "__getitem__", warm_up):
        launch()
    knobs.compilation.listener = None
    return hits


def num_launchers() -> int:
    return len(list(Path(knobs.cache.dir).glob("*/__triton_launcher*")))


def sampling_kernels(counts: Iterable[int]) -> set[Specialization]:
    """What sampling so many rows of a large vocabulary launches."""
    largest = 256
    logits = torch.empty(largest, 128_256, dtype=torch.bfloat16)
    rows, ints, floats = (
        torch.zeros(3, largest, dtype=torch.int64),
        torch.zeros(largest, dtype=torch.int32),
        torch.zeros(largest),
    )
    params = SamplingRows(floats, ints, floats, floats, rows[0])
    with dry_run() as kernels:
        for count in counts:
            sample_rows(logits[:count], rows[1, :count], params, rows[2, :count])
    return kernels


def late_samplers(max_rows: int) -> list[str]:
    """Sampling kernels of steps without a graph, which have any number of samples, that none with a graph launches."""
    rooms = {room.samples for room in (*decode_shapes(max_rows), *mixed_shapes(max_rows, 2048))}
    return sorted(kernel.name for kernel in sampling_kernels(range(1, max_rows + 1)) - sampling_kernels(rooms))


def main() -> None:
    folder, num_compiled = sys.argv[1], int(sys.argv[2])
    triton.runtime.driver.set_active(FakeDriver())  # pyright: ignore[reportArgumentType]
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    facts = read_model_facts(Path(folder))
    config = EngineConfig(
        ModelConfig(folder, dtype=DTYPE, max_model_len=64, load_format="dummy"),
        CacheConfig(block_size=16, num_blocks=8),
        SchedulerConfig(max_num_seqs=20, max_num_batched_tokens=80),
    ).resolve(facts, "cpu")
    device = torch.device("cpu")
    with use_backend(Backend.TRITON), torch.inference_mode():
        runner = _make_runner(load_model(config, device), config, facts, 1, device)

        def warm_up() -> set[Specialization]:
            with dry_run() as kernels:
                warmup.warm_up(runner, 80)
            return kernels

        noted = warm_up()
        with dry_run() as all_layers:
            for room in (*decode_shapes(20), *mixed_shapes(20, 80)):
                runner.forward(room)
        some = set(sorted(noted)[:num_compiled])
        with CompileProcess() as process:
            compiled, again = compile_kernels(some, process, 2), compile_kernels(some, process, 2)
        with CompileProcess() as process:
            process._process.kill()
            compiled_by_none = warmup.compile_kernels(runner, process, 80)
        hits: list[bool] = []
        knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)  # pyright: ignore
        for kernel in sorted(some):
            compile_kernel(kernel, GPUTarget("cuda", 90, 32))
        with dry_run() as gluon:
            multiply()
        with CompileProcess() as process:
            compile_kernels(gluon, process, 1)
        found = {
            "late": late_samplers(20) + late_samplers(256),
            "gluon": sorted(kernel.name for kernel in gluon),
            "gluon hits": hits_of_a_launch(multiply),
            "names": sorted({kernel.name for kernel in noted}),
            "same": noted == warm_up(),
            "forgotten": sorted(kernel.name for kernel in all_layers - noted),
            "compiled": compiled,
            "again": again,
            "compiled by none": compiled_by_none,
            "hits": hits,
            "launches": JITFunction.__getitem__.__qualname__,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
