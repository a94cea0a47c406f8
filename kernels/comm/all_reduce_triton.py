"""Triton kernels of all_reduce.py, built on all_reduce_exchange_triton.py.

Legend: W ranks, N features (or elements of a piece, without a norm). Tiles are [W or a GROUP of ranks,
BLOCK_N]. A program waits only for the other ranks' programs of the same number; all are resident.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .all_reduce_exchange_triton import arrived, begin_step, draw_step, empty_buffer, pointers_to_words, sendable
from .exchange import Algorithm, Exchange, as_rows, buffer_bytes, slot_size

MAX_TILE = 2048  # bytes of the ranks' words per warp: 4 vectors a thread


@triton.jit
def _within(offsets, numel, HAS_NORM: tl.constexpr):
    """Whether an element belongs to the message: without a norm the last row may be short."""
    if HAS_NORM:
        return tl.full(offsets.shape, True, tl.int1)
    else:
        return offsets < numel


@triton.jit
def _sum_of_slots(
    slots, stride_slot, mask, own, rank, x_ptr, state_ptr, alarm_ptr, limit, WORLD: tl.constexpr, GROUP: tl.constexpr
):
    """(sum of all ranks' words [N], rounded to x's dtype, remaining spin limit).

    `slots`: rank 0's words, each further rank's `stride_slot` later; `own`: this rank's.
    """
    total = tl.full(own.shape, -(1 << 31), tl.int32).to(tl.float32, bitcast=True)  # -0: adding to it keeps all bits
    for first in range(0, WORLD, GROUP):
        ranks = first + tl.arange(0, GROUP)[:, None]
        wanted = mask[None, :] & (ranks != rank)
        slot = slots[None, :] + ranks * stride_slot
        words, limit = arrived(  # pyright: ignore[reportGeneralTypeIssues]
            slot, wanted, own[None, :], state_ptr, alarm_ptr, limit
        )
        for i in tl.static_range(GROUP):
            picked = tl.sum(tl.where(ranks == first + i, words, 0), axis=0).to(words.dtype)
            total += picked.to(x_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
    return total.to(x_ptr.dtype.element_ty), limit


@triton.jit
def _residual(residual_ptr, offsets, mask, HAS_NORM: tl.constexpr):
    """The residual, prefetched while the words arrive."""
    if HAS_NORM:
        return tl.load(residual_ptr + offsets, mask=mask, other=0.0)
    else:
        return 0.0


@triton.jit
def _finish(
    total,
    residual,
    offsets,
    mask,
    residual_ptr,
    weight,
    out_ptr,
    eps,
    NUM_FEATURES: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Store sums [R, N]; with a norm add them to the residual and store as `add_rms_norm`."""
    if HAS_NORM:
        rounded = (residual.to(tl.float32) + total.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptr + offsets, rounded, mask=mask)
        x = rounded.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / NUM_FEATURES) + eps)
        total = (x * scale[:, None] * weight[None, :]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rank", "spin_limit"])
def _one_shot_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    peers_ptr,
    state_ptr,
    alarm_ptr,
    stride_buffer,
    stride_slot,
    numel,
    num_rows,
    rank,
    spin_limit,
    eps,
    NUM_FEATURES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WORLD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Every rank sends its message to all and sums all. A buffer: [W slots, stride_slot]."""
    current, before = draw_step(state_ptr)  # pyright: ignore[reportGeneralTypeIssues]
    release_dependents(PDL)
    columns = tl.arange(0, BLOCK_N)
    in_row = columns < NUM_FEATURES
    weight = 1.0
    if HAS_NORM:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    here = pointers_to_words(tl.load(peers_ptr + rank), x_ptr)
    itemsize: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    wait_for_inputs(PDL)
    to_empty, limit = begin_step(state_ptr, current, before, WORLD * stride_slot * itemsize, spin_limit)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        offsets = row * NUM_FEATURES + columns
        mask = in_row & _within(offsets, numel, HAS_NORM)
        own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        for first in range(0, WORLD, GROUP):
            ranks = first + tl.arange(0, GROUP)
            slots = pointers_to_words(tl.load(peers_ptr + ranks), x_ptr) + current * stride_buffer + rank * stride_slot
            tl.store(slots[:, None] + offsets[None, :], own[None, :], mask=mask[None, :] & (ranks != rank)[:, None])
    empty_buffer(here + before * stride_buffer, to_empty // itemsize, BLOCK_N)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        offsets = row * NUM_FEATURES + columns
        mask = in_row & _within(offsets, numel, HAS_NORM)
        own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        residual = _residual(residual_ptr, offsets[None, :], mask[None, :], HAS_NORM)
        slots = here + current * stride_buffer + offsets
        total, limit = _sum_of_slots(
            slots, stride_slot, mask, own, rank, x_ptr, state_ptr, alarm_ptr, limit, WORLD, GROUP
        )
        _finish(
            total[None, :],
            residual,
            offsets[None, :],
            mask[None, :],
            residual_ptr,
            weight,
            out_ptr,
            eps,
            NUM_FEATURES,
            HAS_NORM,
        )


@triton.jit(do_not_specialize=["num_rows", "slice_rows", "rank", "spin_limit"])
def _two_shot_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    peers_ptr,
    state_ptr,
    alarm_ptr,
    stride_buffer,
    stride_slot,
    numel,
    num_rows,
    slice_rows,
    rank,
    spin_limit,
    eps,
    NUM_FEATURES: tl.constexpr,
    HAS_NORM: tl.constexpr,
    WORLD: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rank r sums slice r, `slice_rows` rows, and sends the sums to all.

    A buffer: [W slots, stride_slot] by sender, then as many of sums, by slice.
    """
    current, before = draw_step(state_ptr)  # pyright: ignore[reportGeneralTypeIssues]
    release_dependents(PDL)
    columns = tl.arange(0, BLOCK_N)
    in_row = columns < NUM_FEATURES
    weight = 1.0
    if HAS_NORM:
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    here = pointers_to_words(tl.load(peers_ptr + rank), x_ptr)
    itemsize: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth // 8
    wait_for_inputs(PDL)
    to_empty, limit = begin_step(state_ptr, current, before, 2 * WORLD * stride_slot * itemsize, spin_limit)
    for row in range(tl.program_id(0), slice_rows, tl.num_programs(0)):
        for first in range(0, WORLD, GROUP):
            ranks = first + tl.arange(0, GROUP)
            rows = (ranks * slice_rows + row)[:, None]
            offsets = rows * NUM_FEATURES + columns[None, :]
            mask = in_row[None, :] & (rows < num_rows) & _within(offsets, numel, HAS_NORM) & (ranks != rank)[:, None]
            words = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
            slots = pointers_to_words(tl.load(peers_ptr + ranks), x_ptr) + current * stride_buffer + rank * stride_slot
            tl.store(slots[:, None] + row * NUM_FEATURES + columns[None, :], words, mask=mask)
    empty_buffer(here + before * stride_buffer, to_empty // itemsize, BLOCK_N)
    for row in range(tl.program_id(0), slice_rows, tl.num_programs(0)):
        offsets = (rank * slice_rows + row) * NUM_FEATURES + columns
        mask = in_row & (rank * slice_rows + row < num_rows) & _within(offsets, numel, HAS_NORM)
        own = sendable(tl.load(x_ptr + offsets, mask=mask, other=0.0))
        place = row * NUM_FEATURES + columns
        slots = here + current * stride_buffer + place
        total, limit = _sum_of_slots(
            slots, stride_slot, mask, own, rank, x_ptr, state_ptr, alarm_ptr, limit, WORLD, GROUP
        )
        words = sendable(total)
        for first in range(0, WORLD, GROUP):  # includes its own: one place to read from
            peers = pointers_to_words(tl.load(peers_ptr + first + tl.arange(0, GROUP)), x_ptr)
            to = peers + current * stride_buffer + (WORLD + rank) * stride_slot
            tl.store(to[:, None] + place[None, :], words[None, :], mask=mask[None, :])
    for row in range(tl.program_id(0), slice_rows, tl.num_programs(0)):
        for first in range(0, WORLD, GROUP):
            ranks = first + tl.arange(0, GROUP)[:, None]
            rows = ranks * slice_rows + row
            offsets = rows * NUM_FEATURES + columns[None, :]
            mask = in_row[None, :] & (rows < num_rows) & _within(offsets, numel, HAS_NORM)
            residual = _residual(residual_ptr, offsets, mask, HAS_NORM)
            slots = here + current * stride_buffer + (WORLD + ranks) * stride_slot
            words, limit = arrived(slots + row * NUM_FEATURES + columns[None, :], mask, 0, state_ptr, alarm_ptr, limit)
            total = words.to(x_ptr.dtype.element_ty, bitcast=True)
            _finish(total, residual, offsets, mask, residual_ptr, weight, out_ptr, eps, NUM_FEATURES, HAS_NORM)


def launch_parameters(
    block_n: int, itemsize: int, world_size: int, *, norms_slices: bool = False
) -> tuple[int, int, int]:
    """(ranks held at a time, warps, registers of a thread).

    A thread takes one 16-byte vector of a row, or few more. By default the compiler spills to keep below 64
    registers; norming several ranks' rows at a time takes more.
    """
    num_warps = min(max(block_n * itemsize // 512, 4), 16)
    group = max(1, min(world_size, MAX_TILE * num_warps // (block_n * itemsize)))
    few = group * block_n * itemsize <= 1024 * num_warps and not norms_slices
    return group, num_warps, 64 if few else 128


def max_programs(num_sms: int, num_warps: int, num_registers: int) -> int:
    """Resident programs: each may wait for another rank's."""
    return num_sms * (65536 // (32 * num_warps * num_registers))


def all_reduce_triton(x: torch.Tensor, exchange: Exchange, algorithm: Algorithm) -> torch.Tensor:
    """Sum contiguous x in place."""
    if x.numel():
        _launch(x, x, None, None, 0.0, exchange, algorithm, *as_rows(x.numel()))
    return x


def all_reduce_add_rms_norm_triton(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    exchange: Exchange,
    algorithm: Algorithm,
) -> torch.Tensor:
    """Add the sum of x over ranks to `residual` in place; returns its norm."""
    out = torch.empty_like(x)
    if x.numel():
        num_features = x.shape[-1]
        _launch(x, out, residual, weight, eps, exchange, algorithm, x.numel() // num_features, num_features)
    return out


def _launch(
    x: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    exchange: Exchange,
    algorithm: Algorithm,
    num_rows: int,
    num_features: int,
) -> None:
    """Raises ValueError if a buffer is too small for the message."""
    world_size, numel = exchange.world_size, x.numel()
    needed = buffer_bytes(algorithm, num_rows, num_features, x.itemsize, world_size)
    if needed > exchange.capacity:
        raise ValueError(f"{algorithm.value} of {x.nbytes} bytes needs {needed}; a buffer has {exchange.capacity}")
    sliced = algorithm is Algorithm.TWO_SHOT
    rows = [num_rows, -(-num_rows // world_size)] if sliced else [num_rows]
    block_n = int(triton.next_power_of_2(num_features))
    group, num_warps, num_registers = launch_parameters(
        block_n, x.itemsize, world_size, norms_slices=sliced and weight is not None
    )
    operands = (x, x if residual is None else residual, x if weight is None else weight, out)
    memory = (exchange.peers, exchange.state, exchange.alarm)
    strides = (exchange.capacity // x.itemsize, slot_size(algorithm, num_rows, num_features, world_size))
    launch_kernel(
        _two_shot_kernel if sliced else _one_shot_kernel,
        (min(rows[-1], max_programs(exchange.num_sms, num_warps, num_registers)),),
        (*operands, *memory, *strides, numel, *rows, exchange.rank, exchange.spin_limit, eps),
        NUM_FEATURES=num_features,
        HAS_NORM=weight is not None,
        WORLD=world_size,
        GROUP=group,
        BLOCK_N=block_n,
        num_warps=num_warps,
        maxnreg=num_registers,
        **pdl_launch(x),
    )
