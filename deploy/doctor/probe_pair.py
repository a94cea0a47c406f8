"""Probe, one process a rank: rates of each pair and of an all-reduce, and symmetric memory on GPUs.

Arguments: rank, ranks, device (cuda: NCCL; cpu: gloo), rendezvous file, bytes of a message. The
sender announces a pair, so that a hang can be located; the receiver reports its time.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from itertools import permutations

import torch
import torch.distributed as dist

from ...replicas.parallel.c10d import FileStore
from ...replicas.parallel.process_groups import ProcessGroups
from ...replicas.parallel.symmetric_memory import NoSymmetricMemory, open_symmetric_memory
from .process import begin, say

_REPEATS = 5
_SHARED = 1 << 20  # bytes


def main() -> None:
    _, (rank, ranks, device, file, num_bytes) = begin()
    _Rank(int(rank), int(ranks), device, file, int(num_bytes)).measure()
    sys.stdout.flush()
    os._exit(0)  # destroying a group waits for its other members


class _Rank:
    """A member of a process group, made as the ranks of a model make theirs."""

    def __init__(self, rank: int, ranks: int, device: str, file: str, num_bytes: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.on_gpu = device == "cuda"
        self.device = torch.device("cuda", rank) if self.on_gpu else torch.device("cpu")
        if self.on_gpu:
            torch.cuda.set_device(self.device)
        self.store = FileStore(file, ranks)
        groups = ProcessGroups(self.store, rank, self.device, "127.0.0.1")
        self.group = groups.open(
            "doctor", range(ranks), connect=False
        )  # pairs connect one by one, so that one can fail alone
        self.message = torch.empty(num_bytes // 4, dtype=torch.float32, device=self.device)

    def measure(self) -> None:
        for source, target in permutations(range(self.ranks), 2):
            self.measure_pair(source, target)
        self.measure_sum()
        if self.on_gpu:
            self.try_symmetric_memory()

    def measure_pair(self, source: int, target: int) -> None:
        if self.rank == source:
            say(begin=[source, target])
            self.message.fill_(source + 1)
            self._seconds(lambda: self.group.send([self.message], target, 0))
        elif self.rank == target:
            self.message.zero_()
            seconds = self._seconds(lambda: self.group.recv([self.message], source, 0))
            right = bool((self.message == source + 1).all())
            say(source=source, target=target, right=right, bytes_per_s=self.message.nbytes / seconds)

    def measure_sum(self) -> None:
        """Bytes a second of an all-reduce: each rank sends and receives 2 (n - 1)

        n of the message.
        """
        if self.rank == 0:
            say(begin="sum")
        self.message.fill_(1.0)
        self.group.allreduce([self.message]).wait()
        right = bool((self.message == self.ranks).all())
        self.message.zero_()
        seconds = self._seconds(lambda: self.group.allreduce([self.message]))
        if self.rank == 0:
            moved = 2 * (self.ranks - 1) / self.ranks * self.message.nbytes
            say(sum=self.ranks, right=right, bytes_per_s=moved / seconds)

    def try_symmetric_memory(self) -> None:
        """Open the symmetric memory that all-reduce kernels use; every rank gets the same answer."""
        reason = ""
        try:
            open_symmetric_memory(self.store, "doctor", self.rank, self.ranks, self.device, _SHARED)
        except NoSymmetricMemory as none:
            reason = str(none)
        if self.rank == 0:
            say(symmetric=not reason, reason=reason)

    def _seconds(self, exchange: Callable[[], dist.Work]) -> float:
        """Seconds of one exchange, after one that connects."""
        exchange().wait()
        self._synchronize()
        begin = time.perf_counter()
        for _ in range(_REPEATS):
            exchange().wait()
        self._synchronize()
        return (time.perf_counter() - begin) / _REPEATS

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
