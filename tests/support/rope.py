"""A cos/sin cache as RotaryEmbedding makes it."""

from __future__ import annotations

import torch


def rope_cache(num_positions: int, num_rotated: int) -> torch.Tensor:
    """fp32 [num_positions, num_rotated]: cosines, then sines."""
    angles = torch.arange(num_positions)[:, None] / 100.0 ** (torch.arange(0, num_rotated, 2) / num_rotated)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
