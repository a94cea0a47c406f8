"""Rotary position embedding, rotate-half (NeoX) form, on the first R of D features of each head.

    y[i]       = x[i] * cos[p, i] - x[i + R/2] * sin[p, i]         i < R/2
    y[i + R/2] = x[i + R/2] * cos[p, i] + x[i] * sin[p, i]         features R..D-1 unchanged

Legend: T tokens, N heads (queries and keys), D head_dim, R rotated features (even), P positions. cache [P,
R] fp32: cos in the first R/2 columns, then sin; positions int64 [T]; x [T, N, D]. On CUDA: rope_triton.py.

Paper: Su et al., RoFormer, 2021, arXiv:2104.09864.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backend import Backend, backend_of


class RopeFactors(NamedTuple):
    """Torch input: factors spread over R features, for one mul and one fused multiply-add."""

    cos: torch.Tensor  # [T, 1, R]
    sin: torch.Tensor  # [T, 1, R], negated in the first half


class RopeIndex(NamedTuple):
    """Triton input."""

    cache: torch.Tensor  # fp32 [P, R]
    positions: torch.Tensor  # int64 [T]


RopeRows = RopeFactors | RopeIndex


def rope_rows(cache: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> RopeRows:
    """The rows of `cache` [P, R] at `positions` [T], for x of `dtype`."""
    if cache.dim() != 2 or cache.shape[1] % 2:
        raise ValueError(f"the cos/sin cache has shape {tuple(cache.shape)}; expected [positions, even]")
    if backend_of(positions) is not Backend.TORCH:
        return RopeIndex(cache, positions)
    cos, sin = cache.index_select(0, positions).to(dtype).unsqueeze(1).chunk(2, dim=-1)
    return RopeFactors(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1))


def rope_ref(x: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The formula in fp32, as a new tensor of x's dtype."""
    half = cache.shape[1] // 2
    cos, sin = cache[positions, None, :half].float(), cache[positions, None, half:].float()
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(x.dtype)


def rope(x: torch.Tensor, rows: RopeRows) -> torch.Tensor:
    """Rotate x [T, N, D] in place and return it."""
    if isinstance(rows, RopeIndex):
        check_rope(x, rows)
        from .rope_triton import rope_triton

        rope_triton(x, rows.cache, rows.positions)
        return x
    num_rotated = rows.cos.shape[-1]
    if x.dim() != 3 or x.shape[0] != rows.cos.shape[0] or x.shape[2] < num_rotated:
        raise _unfit(x, rows.cos.shape[0], num_rotated)
    rotated = x if x.shape[2] == num_rotated else x[..., :num_rotated]
    first, second = rotated.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    rotated.mul_(rows.cos).addcmul_(swapped, rows.sin)
    return x


def check_rope(x: torch.Tensor, index: RopeIndex) -> None:
    """Raise ValueError where T differs, or the heads are too small."""
    num_tokens, num_rotated = index.positions.shape[0], index.cache.shape[1]
    if x.dim() != 3 or x.shape[0] != num_tokens or x.shape[2] < num_rotated:
        raise _unfit(x, num_tokens, num_rotated)


def _unfit(x: torch.Tensor, num_tokens: int, num_rotated: int) -> ValueError:
    return ValueError(f"x has shape {tuple(x.shape)}; expected [{num_tokens}, heads, head_dim >= {num_rotated}]")


def rope_cost(num_tokens: int, num_heads: int, num_rotated: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): a token's heads share factors."""
    size = num_tokens * num_heads * num_rotated
    return 2 * size * dtype.itemsize + num_tokens * num_rotated * 4, 3 * size
