"""A rank's place among the ranks of one model copy, and the collectives that its layers call.

Layers name the collective where the mathematics needs it; with one rank it is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Tensor- and pipeline-parallel coordinates. `tp_group` carries the collectives of the ranks of one stage."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tp_group: dist.ProcessGroup | None = None

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def stage_layers(self, num_layers: int) -> range:
        """The layers of this stage: equal counts, the first stages taking one more where they do not divide."""
        base, extra = divmod(num_layers, self.pp_size)
        first = self.pp_rank * base + min(self.pp_rank, extra)
        return range(first, first + base + (self.pp_rank < extra))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel ranks, in place."""
        if self.tp_size > 1:
            dist.all_reduce(x, group=self.tp_group)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every tensor-parallel rank's x [..., n], joined along the last axis: [..., tp_size * n]."""
        if self.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        dist.all_gather(parts, x.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim=-1)
