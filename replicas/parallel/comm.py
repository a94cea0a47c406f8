"""A rank's parallel coordinates and collectives, which are identities with one rank."""

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

    tp: collectives of this stage; None with one rank. pp: links to other stages; None with one
    stage.
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
        """See Collectives."""
        return x if self.tp is None else self.tp.all_reduce(x)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        return x if self.tp is None else self.tp.all_gather(x)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """See Collectives."""
        return x if self.tp is None else self.tp.all_to_all(x)

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """See Collectives."""
        if self.tp is None:
            return add_rms_norm(x, residual, weight, eps)
        return self.tp.all_reduce_add_rms_norm(x, residual, weight, eps)

    def check(self) -> None:
        """See Collectives."""
        if self.tp is not None:
            self.tp.check()
