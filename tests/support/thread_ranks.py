"""Tensor-parallel ranks as threads of one process, joined by gloo on loopback: the collectives are those of ranks that
are processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

from shoal.replicas.parallel.collectives import TorchCollectives
from shoal.replicas.parallel.comm import ParallelContext
from shoal.replicas.parallel.process_groups import ProcessGroups

T = TypeVar("T")


class CountedCollectives(TorchCollectives):
    """Counts the bytes that the rank hands to each kind of collective."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self.sent = {"all_reduce": 0, "all_gather": 0, "all_to_all": 0}

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.sent["all_reduce"] += x.nbytes
        return super().all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.sent["all_gather"] += x.nbytes
        return super().all_gather(x)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        self.sent["all_to_all"] += x.nbytes
        return super().all_to_all(x)


def run_ranks(size: int, work: Callable[[ParallelContext], T]) -> list[T]:
    """What `work` returns on each rank. A rank that fails ends the others' collectives, and its error is raised."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    groups = [ProcessGroups(store, rank, torch.device("cpu"), "127.0.0.1") for rank in range(size)]

    def run(rank: int) -> T:
        try:
            collectives = CountedCollectives(groups[rank].open("tp", range(size)))
            return work(ParallelContext(tp_rank=rank, tp_size=size, tp=collectives))
        except BaseException:
            for each in groups:
                each.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
    return [future.result() for future in futures]
