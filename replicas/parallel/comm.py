"""A rank's place among the ranks of one model copy, and the collectives that its layers call.

Layers name the collective where the mathematics needs it; with one rank it is the identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...kernels.linear.rms_norm import add_rms_norm
from .collectives import Collectives

if TYPE_CHECKING:
    from .pipeline import PipelineLinks


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """Tensor- and pipeline-parallel coordinates; world rank = pp_rank * tp_size + tp_rank.

    tp: what the ranks of this stage do together; None where there is one. pp: the links to the neighbouring stages;
    None where there is one stage.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    tp: Collectives | None = None
    pp: PipelineLinks | None = None

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the tensor-parallel ranks, in place."""
        return x if self.tp is None else self.tp.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every tensor-parallel rank's x [..., n], joined along the last axis: [..., tp_size * n]."""
        return x if self.tp is None else self.tp.all_gather(x)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x [tp_size, ...], a block for each tensor-parallel rank -> the blocks that they had for this one."""
        return x if self.tp is None else self.tp.all_to_all(x)

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds the sum of x over the tensor-parallel ranks to `residual` in place; returns it normalised."""
        if self.tp is None:
            return add_rms_norm(x, residual, weight, eps)
        return self.tp.all_reduce_add_rms_norm(x, residual, weight, eps)

    def check(self) -> None:
        """Raises ShardGroupError once an operation has ended without the other ranks; see Collectives."""
        if self.tp is not None:
            self.tp.check()
