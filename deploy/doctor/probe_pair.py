"""Probe, one process for each rank: what a process group carries from each rank to each other one, and in a sum.

Arguments: rank, ranks, backend (nccl or gloo), a file for the rendezvous, bytes of a message.
The sender says that a pair begins, so that the one that hangs is known; the receiver says how long it took.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import permutations

import torch
import torch.distributed as dist

from .process import begin, say

_REPEATS = 5


def main() -> None:
    limit_s, (rank, ranks, backend, file, num_bytes) = begin()
    group = _Group(int(rank), int(ranks), backend, int(num_bytes))
    if group.on_gpu:
        torch.cuda.set_device(group.rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(file, group.ranks),  # pyright: ignore[reportPrivateImportUsage]
        rank=group.rank,
        world_size=group.ranks,
        timeout=timedelta(seconds=limit_s),
    )
    for source, target in permutations(range(group.ranks), 2):
        group.measure_pair(source, target)
    group.measure_sum()
    sys.stdout.flush()
    os._exit(0)  # destroying a group waits for its other members


class _Group:
    def __init__(self, rank: int, ranks: int, backend: str, num_bytes: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.on_gpu = backend == "nccl"
        self.device = torch.device("cuda", rank) if self.on_gpu else torch.device("cpu")
        self.message = torch.empty(num_bytes // 4, dtype=torch.float32, device=self.device)

    def measure_pair(self, source: int, target: int) -> None:
        if self.rank == source:
            say(begin=[source, target])
            self.message.fill_(source + 1)
            self._seconds(lambda: dist.send(self.message, target))
        elif self.rank == target:
            self.message.zero_()
            seconds = self._seconds(lambda: dist.recv(self.message, source))
            right = bool((self.message == source + 1).all())
            say(source=source, target=target, right=right, bytes_per_s=self.message.nbytes / seconds)

    def measure_sum(self) -> None:
        """An all-reduce. Every rank sends and receives 2 (n - 1) / n of the message, and that is its rate."""
        if self.rank == 0:
            say(begin="sum")
        self.message.fill_(1.0)
        dist.all_reduce(self.message)
        right = bool((self.message == self.ranks).all())
        self.message.zero_()
        seconds = self._seconds(lambda: dist.all_reduce(self.message))
        if self.rank == 0:
            moved = 2 * (self.ranks - 1) / self.ranks * self.message.nbytes
            say(sum=self.ranks, right=right, bytes_per_s=moved / seconds)

    def _seconds(self, exchange: Callable[[], object]) -> float:
        """Of one exchange, after a first that connects."""
        exchange()
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            exchange()
        self._synchronize()
        return (time.perf_counter() - begin) / _REPEATS

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
