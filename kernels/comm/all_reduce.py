"""The sum of a tensor over ranks, alone or with the residual addition and norm that follow it.

    all_reduce(x)                     : x[rank] <- sum over r of x[r], on every rank
    all_reduce_add_rms_norm(x, y, w)  : y <- y + sum over r of x[r], then rms_norm(y, w)

Legend: W ranks, T rows, N features. x and y [..., N], w [N]; n bytes of x. Sums are in fp32 in rank order,
rounded once to x's dtype. So every rank gets the same bits, independent of other rows.

Algorithms over symmetric memory (all_reduce_triton.py); NCCL takes larger messages:
    one-shot      every rank sends x to all others and sums what it receives: one hop, (W - 1) n bytes;
    two-shot      rank r sums slice r of all and sends it to the others: two hops, 2 (W - 1) / W n bytes.

Paper: Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005 (reduce-scatter,
all-gather).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backend import Backend, backend_of
from ..linear.rms_norm import add_rms_norm_ref
from .exchange import INT8_GROUP, INT8_LEAST_SCALE, INT8_PIECE, Algorithm, Exchange

WORLD_SIZES = (2, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Largest KiB of (one-shot, two-shot) by ranks; NCCL beyond. Two ranks measured on H200s over NVLink: NCCL
# takes 1.2 times as long at 16 MiB. 4 and 8: where one-shot's extra bytes take as long as a hop, 2 us.
LIMITS_KIB = {2: (2048, 16384), 4: (512, 4096), 8: (128, 4096)}
# Larger messages travel in 8 bits if enabled: on two H200s 4 MiB take 0.75 of bf16's time, 2 MiB as long.
INT8_ABOVE_KIB = 2048


def choose(num_bytes: int, world_size: int) -> Algorithm | None:
    """The fastest algorithm for `num_bytes`; None is NCCL."""
    one_shot, two_shot = LIMITS_KIB.get(world_size, (0, 0))
    if num_bytes <= one_shot << 10:
        return Algorithm.ONE_SHOT
    return Algorithm.TWO_SHOT if num_bytes <= two_shot << 10 else None


def all_reduce_ref(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the ranks' tensors in fp32."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def all_reduce_int8_ref(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of `all_reduce_int8`: sent values are rounded to 255 steps of their group of 128 elements.

    Rank r sums slice r, its own part unrounded, and sends the rounded sum.
    Let a[r] be a group's largest magnitude in rank r's part, and s in the sum. The error is at most (sum of
    the others' a[r] + s) / 254.
    """
    flat = [part.float().flatten() for part in parts]
    numel, share = len(flat[0]), math.ceil(math.ceil(len(flat[0]) / INT8_PIECE) / len(parts)) * INT8_PIECE
    sums = []
    for owner, start in enumerate(range(0, numel, share)):
        total = torch.zeros_like(flat[0][start : start + share])
        for rank, part in enumerate(flat):
            piece = part[start : start + share]
            total = total + (piece if rank == owner else _rounded_to_int8(piece))
        sums.append(_rounded_to_int8(total))
    return torch.cat(sums).view(parts[0].shape).to(parts[0].dtype)


def _rounded_to_int8(x: torch.Tensor) -> torch.Tensor:
    groups = torch.nn.functional.pad(x, (0, -len(x) % INT8_GROUP)).view(-1, INT8_GROUP)
    largest = groups.abs().amax(1, keepdim=True)
    scale = torch.where(largest < math.inf, largest * (1 / 127), math.nan)
    inverse = torch.where(scale > INT8_LEAST_SCALE, 1 / scale, 0.0)
    return (((groups * inverse + 127.5).floor() - 127) * scale).flatten()[: len(x)]


def all_reduce_add_rms_norm_ref(
    parts: Sequence[torch.Tensor], residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normalised, new residual), out of place."""
    return add_rms_norm_ref(all_reduce_ref(parts), residual, weight, eps)


def all_reduce(x: torch.Tensor, exchange: Exchange, algorithm: Algorithm) -> torch.Tensor:
    """Sum x over the ranks in place; every rank passes the same shape, dtype and algorithm.

    Raises ValueError unless x is contiguous, on a GPU, of one of DTYPES and fits a buffer.
    """
    _check(x, exchange)
    from .all_reduce_triton import all_reduce_triton

    return all_reduce_triton(x, exchange, algorithm)


def all_reduce_add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    exchange: Exchange,
    algorithm: Algorithm,
) -> torch.Tensor:
    """Add the ranks' sum of x [..., N] to `residual` [..., N] in place; returns its norm with weight [N].

    Raises ValueError as `all_reduce`, and for mismatched shapes.
    """
    _check(x, exchange)
    if x.shape != residual.shape or not residual.is_contiguous():
        raise ValueError(
            f"the residual has shape {tuple(residual.shape)} and strides {residual.stride()}, x {tuple(x.shape)}; "
            "they must have one shape, without gaps"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {x.shape[-1]} features")
    from .all_reduce_triton import all_reduce_add_rms_norm_triton

    return all_reduce_add_rms_norm_triton(x, residual, weight, eps, exchange, algorithm)


def all_reduce_int8(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Sum over the ranks in place with 8 bits an element (`all_reduce_int8_ref`). Raises ValueError as `all_reduce`."""
    _check(x, exchange)
    from .all_reduce_int8_triton import all_reduce_int8_triton

    return all_reduce_int8_triton(x, exchange)


def _check(x: torch.Tensor, exchange: Exchange) -> None:
    if backend_of(x) is Backend.TORCH:
        raise ValueError("all-reduce over symmetric memory runs on a CUDA device; elsewhere use torch.distributed")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}; the kernels sum {', '.join(map(str, DTYPES))}")
    if exchange.world_size not in WORLD_SIZES:
        raise ValueError(f"{exchange.world_size} ranks; the kernels know {WORLD_SIZES}")
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}; it must be contiguous")


def all_reduce_cost(num_bytes: int, world_size: int, algorithm: Algorithm) -> int:
    """Bytes that a rank sends; it receives as many."""
    if algorithm is Algorithm.ONE_SHOT:
        return (world_size - 1) * num_bytes
    return 2 * (world_size - 1) * num_bytes // world_size
