"""Sampling and penalty parameters as tensors with one entry per row or slot."""

from __future__ import annotations

from typing import NamedTuple

import torch


class SamplingRows(NamedTuple):
    """Sampling parameters by row, each [R], on the device of the logits."""

    temperature: torch.Tensor  # float32; 0 is greedy
    top_k: torch.Tensor  # int32; 0 keeps all
    top_p: torch.Tensor  # float32; 1 keeps all
    min_p: torch.Tensor  # float32; 0 keeps all
    seed: torch.Tensor  # int64, the bit pattern of the 64-bit key


class PenaltySlots(NamedTuple):
    """Token history and penalties by slot."""

    history: torch.Tensor  # int32 [S, V]
    repetition: torch.Tensor  # float32 [S]; 1 changes nothing
    frequency: torch.Tensor  # float32 [S]; 0 changes nothing
    presence: torch.Tensor  # float32 [S]; 0 changes nothing
