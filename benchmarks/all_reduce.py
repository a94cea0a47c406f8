"""Microseconds of an all-reduce over the GPUs of one machine: NCCL, torch's symmetric memory and Shoal's kernels.

Each figure is the mean of CALLS calls in one CUDA graph: the median of its replays, on the slowest rank. A message is
[rows, hidden] of bf16. Without a norm, x becomes the sum. With a norm, the sum is added to a residual and normed: by
one kernel of Shoal's, or by NCCL and then `add_rms_norm`. Torch's operators get memory that is already symmetric.
Goal on two H200s: 7 us to 128 KiB, 8 us at 512 KiB, 20 us at 4 MiB.

    python -m benchmarks.all_reduce [--gpus 2,4] [--hidden 4096] [--sizes 8,128,512] [--out FOLDER] [--commit C]
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.cuda import nccl

from benchmarks.report import RESULTS, Report
from shoal.kernels.comm.all_reduce import all_reduce, all_reduce_add_rms_norm, all_reduce_cost, all_reduce_int8, choose
from shoal.kernels.comm.exchange import NUM_BUFFERS, STATE_SIZE, Algorithm, Exchange, buffer_bytes
from shoal.kernels.linear.rms_norm import add_rms_norm
from shoal.replicas.parallel.c10d import TCPStore
from shoal.replicas.parallel.symmetric_memory import SymmetricMemory, open_symmetric_memory

CALLS = 50  # per graph, to amortise the launch
SIZES_KIB = (8, 32, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
GOALS_US = {8: 7.0, 32: 7.0, 128: 7.0, 512: 8.0, 4096: 20.0}  # by KiB, on two H200s
EPS = 1e-5
SPIN_LIMIT = 1 << 22


def run_ranks(world_size: int, body: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> list[Any]:
    """Run `body(rank, world_size, store, *arguments)` in a process per GPU, with torch's
    default group; returns the results.

    Raises RuntimeError with the first rank's error.
    """
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_run, args=(sender, rank, world_size, store.port, body, arguments), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for each in ranks:
        each.start()
    try:
        for _, sender in pipes:
            sender.close()
        results: list[Any] = [None] * world_size
        waiting = {receiver: rank for rank, (receiver, _) in enumerate(pipes)}
        while waiting:
            ready = wait(waiting, timeout_s)
            if not ready:
                raise RuntimeError(f"ranks {sorted(waiting.values())} have not answered for {timeout_s:.0f} s")
            for receiver in [each for each in waiting if each in ready]:
                rank = waiting.pop(receiver)
                try:
                    failed, results[rank] = receiver.recv()
                except EOFError:
                    raise RuntimeError(f"rank {rank} ended without an answer") from None
                if failed:
                    raise RuntimeError(f"rank {rank}: {results[rank]}")
        return results
    finally:
        for each in ranks:
            each.kill()


def _run(
    sender: Connection, rank: int, world_size: int, port: int, body: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        torch.cuda.set_device(rank)
        store = TCPStore("127.0.0.1", port, wait_for_workers=False)
        group = {"store": store, "rank": rank, "world_size": world_size, "device_id": torch.device("cuda", rank)}
        dist.init_process_group("nccl", **group)
        sender.send((False, body(rank, world_size, store, *arguments)))
    except Exception as error:  # reported by the other process
        sender.send((True, f"{type(error).__name__}: {error}"))
        raise


def open_exchange(
    store: TCPStore, rank: int, world_size: int, capacity: int, name: str = "benchmark"
) -> tuple[Exchange, SymmetricMemory]:
    """A rank's view of the symmetric memory for the kernels, and that memory."""
    device = torch.device("cuda", rank)
    memory = open_symmetric_memory(store, name, rank, world_size, device, NUM_BUFFERS * capacity)
    peers = torch.tensor(memory.addresses, dtype=torch.int64, device=device)
    state = torch.zeros(STATE_SIZE, dtype=torch.int64, device=device)
    alarm = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return Exchange(rank, world_size, capacity, memory.own, peers, state, alarm, SPIN_LIMIT, num_sms), memory


def graph_us(call: Callable[[], Any], replays: int, calls: int = CALLS) -> float:
    """Microseconds of `call` in a CUDA graph, on this rank. Every rank measures the same at once."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / calls)
    return median(times)


def ways(
    rows: int, hidden: int, exchange: Exchange, torchs: SymmetricMemory
) -> dict[str, dict[str, Callable[[], Any]]]:
    """Measured ways of one size, by kind of all-reduce (with or without a norm) and name."""
    kib = rows * hidden * 2 / 1024
    device = torch.device("cuda", exchange.rank)
    x = torch.randn(rows, hidden, device=device).bfloat16()
    y = x.clone()  # a copy: the in-place sum grows
    residual, weight = torch.zeros_like(x), torch.ones(hidden, dtype=x.dtype, device=device)
    shared = torchs.own[: x.nbytes].view(x.dtype).zero_()
    symm_mem = torch.ops.symm_mem
    plain: dict[str, Callable[[], Any]] = {"NCCL": lambda: dist.all_reduce(x)}
    normed: dict[str, Callable[[], Any]] = {
        "NCCL": lambda: (dist.all_reduce(x), add_rms_norm(x, residual, weight, EPS)),
    }
    plain["torch one-shot"] = lambda: symm_mem.one_shot_all_reduce(shared, "sum", torchs.group_name)
    if x.nbytes % (16 * exchange.world_size) == 0:
        plain["torch two-shot"] = lambda: symm_mem.two_shot_all_reduce_(shared, "sum", torchs.group_name)
    for algorithm in Algorithm:
        if buffer_bytes(algorithm, rows, hidden, 2, exchange.world_size) <= exchange.capacity:
            name = algorithm.value.replace("_", "-")
            plain[name] = partial(all_reduce, x, exchange, algorithm)
            normed[name] = partial(all_reduce_add_rms_norm, y, residual, weight, EPS, exchange, algorithm)
    if kib > 4096:  # slower than NCCL there
        plain.pop("torch one-shot")
    if kib >= 2048:
        plain["int8"] = lambda: all_reduce_int8(x, exchange)
    return {"sum": plain, "sum and norm": normed}


def measure(
    rank: int, world_size: int, store: TCPStore, sizes_kib: list[int], hidden: int, replays: int
) -> list[dict[str, Any]]:
    """A row per size and kind of all-reduce: microseconds by way."""
    largest = max(sizes_kib) << 10
    exchange, _memory = open_exchange(store, rank, world_size, min(4 * largest, 64 << 20))
    torchs = open_symmetric_memory(store, "torch", rank, world_size, torch.device("cuda", rank), largest)
    found = []
    for kib in sizes_kib:
        rows = max(1, (kib << 10) // (2 * hidden))
        for kind, calls in ways(rows, hidden, exchange, torchs).items():
            row: dict[str, Any] = {"KiB": kib, "kind": kind}
            for name, call in calls.items():
                slowest = torch.tensor(graph_us(call, replays), device=f"cuda:{rank}")
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                row[name] = slowest.item()
            found.append(row)
    if exchange.alarm[0]:
        raise RuntimeError("a kernel timed out waiting for another rank")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="2,4", help="sizes of the group; sizes beyond the machine's are left out")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES_KIB)), help="in KiB")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--commit", help="recorded if there is no checkout to read it from")
    asked = parser.parse_args()
    sizes = [int(size) for size in asked.sizes.split(",")]
    groups = [int(size) for size in asked.gpus.split(",") if int(size) <= torch.cuda.device_count()]
    if not groups:
        print(f"all_reduce: needs {asked.gpus} GPUs, and there are {torch.cuda.device_count()}", file=sys.stderr)
        return 2
    report = Report("all_reduce", device=f"{torch.cuda.get_device_name()} x {max(groups)}")
    report.settings = {
        "hidden": asked.hidden, "dtype": "bfloat16", "calls in a graph": CALLS, "torch": torch.__version__,
        "NCCL": ".".join(map(str, nccl.version())),
    }  # fmt: skip
    if asked.commit is not None:
        report.commit = asked.commit
    for world_size in groups:
        results = run_ranks(world_size, measure, sizes, asked.hidden, asked.replays)
        for row in results[0]:
            chosen = choose(row["KiB"] << 10, world_size)
            row["chosen"] = "NCCL" if chosen is None else chosen.value.replace("_", "-")
            if chosen is not None:  # as many received as sent
                row["GB/s"] = 1e-3 * all_reduce_cost(row["KiB"] << 10, world_size, chosen) / row[row["chosen"]]
            goal = GOALS_US.get(row["KiB"]) if world_size == 2 and row["kind"] == "sum" else None
            report.add(GPUs=world_size, **row, goal=goal)
    report.show()
    report.write(asked.out / "all_reduce.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
