"""Ranks as processes on the CPU that write into each other's memory, for kernels that Triton interprets.

Memory is files that every process maps; they are truly concurrent, so a rank does spin until another has written.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from shoal.kernels.backend import Backend, use_backend
from shoal.kernels.comm.exchange import NUM_BUFFERS, STATE_SIZE, Exchange
from tests.support.interpreter import search_once_a_launch

CAPACITY = 1 << 14


def map_exchange(
    folder: Path, rank: int, world_size: int, capacity: int, spin_limit: int
) -> tuple[Exchange, list[torch.Tensor]]:
    """(what `rank` knows of the ranks' memory, the tensors that map it)."""
    size = NUM_BUFFERS * capacity
    memory = [torch.from_file(str(folder / f"memory_{r}"), True, size, dtype=torch.uint8) for r in range(world_size)]
    peers = torch.tensor([each.data_ptr() for each in memory])
    state, alarm = torch.zeros(STATE_SIZE, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    return Exchange(rank, world_size, capacity, memory[rank], peers, state, alarm, spin_limit, 4), memory


def run_ranks(
    folder: Path,
    world_size: int,
    body: Callable[..., Any],
    *arguments: Any,
    capacity: int = CAPACITY,
    spin_limit: int = 1 << 30,
) -> list[Any]:
    """What `body(exchange, *arguments)` returns for each rank, in a process of its own with Triton's interpreter."""
    for rank in range(world_size):
        (folder / f"memory_{rank}").write_bytes(b"\xff" * (NUM_BUFFERS * capacity))
    context = multiprocessing.get_context("forkserver")  # one process imports torch and triton, the ranks are its forks
    context.set_forkserver_preload([__name__, "shoal.kernels.comm.all_reduce_triton", body.__module__])
    ranks = [
        context.Process(
            target=_run, args=(folder, rank, world_size, capacity, spin_limit, body, arguments), daemon=True
        )
        for rank in range(world_size)
    ]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(120)
    try:
        assert [each.exitcode for each in ranks] == [0] * world_size
    finally:
        for each in ranks:
            each.kill()
    return [torch.load(folder / f"result_{rank}", weights_only=True) for rank in range(world_size)]


def _run(
    folder: Path,
    rank: int,
    world_size: int,
    capacity: int,
    spin_limit: int,
    body: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    exchange, _memory = map_exchange(folder, rank, world_size, capacity, spin_limit)
    search_once_a_launch()
    with use_backend(Backend.INTERPRET):
        torch.save(body(exchange, *arguments), folder / f"result_{rank}")
