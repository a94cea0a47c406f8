"""Rotary position embedding, in the rotate-half (NeoX) arrangement, on the first R of D features of each head.

    y[i]       = x[i] * cos[p, i] - x[i + R/2] * sin[p, i]         i < R/2
    y[i + R/2] = x[i + R/2] * cos[p, i] + x[i] * sin[p, i]         features R..D-1 stay as they are

Legend: T tokens, N heads (queries and keys together), D head_dim, R rotated features (even), P positions.
cache [P, R] fp32 holds cos in its first R/2 columns and sin in the others; positions int64 [T]; x [T, N, D].
`rope_rows` runs once a step for all layers, `rope` once a layer, in place.

Called by replicas/layers/attention.py. Paper: Su et al., RoFormer, 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class RopeRows(NamedTuple):
    """Factors of each token, spread over all R features so that `rope` is a multiplication and a fused one."""

    cos: torch.Tensor  # [T, 1, R]
    sin: torch.Tensor  # [T, 1, R], negated in the first half


def rope_rows(cache: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> RopeRows:
    """The rows of `cache` [P, R] at `positions` [T], in `dtype`."""
    if cache.dim() != 2 or cache.shape[1] % 2:
        raise ValueError(f"the cos/sin cache has shape {tuple(cache.shape)}; expected [positions, even]")
    cos, sin = cache.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return RopeRows(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rope_ref(x: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The formula in fp32, as a new tensor of x's dtype. x [T, N, D]."""
    half = cache.shape[1] // 2
    cos, sin = cache[positions, None, :half].float(), cache[positions, None, half:].float()
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


def rope(x: torch.Tensor, rows: RopeRows) -> torch.Tensor:
    """Rotates x [T, N, D] in place (it may be a view of the fused projection) and returns it."""
    num_rotated = rows.cos.shape[-1]
    if x.dim() != 3 or x.shape[0] != rows.cos.shape[0] or x.shape[2] < num_rotated:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected [{rows.cos.shape[0]}, heads, head_dim >= {num_rotated}]"
        )
    rotated = x if x.shape[2] == num_rotated else x[..., :num_rotated]
    first, second = rotated.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    rotated.mul_(rows.cos).addcmul_(swapped, rows.sin)
    return x
