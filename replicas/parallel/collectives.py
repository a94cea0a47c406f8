"""What the ranks of one tensor-parallel group do together, and the plain implementation of it by torch.distributed."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist

from ...kernels.linear.rms_norm import add_rms_norm
from .c10d import all_gather_into


class Collectives(Protocol):
    """Operations of all ranks of a tensor-parallel group, in the same order on each of them.

    Every rank gets the same bits. On a GPU all of them run on the current stream, wait for nothing on the host, and can
    be captured in a CUDA graph.
    """

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the ranks, in place."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x [..., n], joined along the last axis in order of rank: [..., ranks * n]."""
        ...

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x [ranks, ...], a block for each rank -> [ranks, ...], the block that each rank had for this one."""
        ...

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds the sum of x [T, N] over the ranks to `residual` [T, N] in place; returns it normalised by RMSNorm with
        weight [N], as kernels.rms_norm.add_rms_norm does. x is of no use afterwards."""
        ...

    def check(self) -> None:
        """Raises ShardGroupError once an operation has ended without the other ranks: what it made is NaN. Called on
        the host before each step, and before a step's tokens are believed; costs no more than a read of memory."""
        ...


class TorchCollectives:
    """By a process group: gloo for tensors on CPU, NCCL for those of a GPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cpu and self.group.size() > 2:
            return self._sum_in_order(x)
        dist.all_reduce(x, group=self.group)
        return x

    def _sum_in_order(self, x: torch.Tensor) -> torch.Tensor:
        """In place, in order of rank: gloo sums each part of a message in another order, so that a token's bits would
        depend on the tokens beside it. As quick for few tokens; at 8 MB and four ranks 190 ms against 30 (two cores).
        """
        parts = self._gather(x)
        torch.add(parts[0], parts[1], out=x)
        for part in parts[2:]:
            x += part
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._gather(x).movedim(0, -2).flatten(-2)

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks, ...]."""
        x = x.contiguous()
        parts = torch.empty((self.group.size(), *x.shape), dtype=x.dtype, device=x.device)
        all_gather_into(self.group, parts, x)
        return parts

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, x.contiguous(), group=self.group)
        return received

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def check(self) -> None:
        """Nothing to look for: what a process group cannot do raises, or never ends."""
