"""Triton kernel of all_reduce_int8: two-shot over symmetric memory with 8 bits an element.

Legend: W ranks. A sent piece is PIECE bytes, then an fp32 scale for each of its GROUPS groups of 128
elements. A byte is the value in units of its group's scale, plus 127: 0 to 254; 255 is MISSING.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .all_reduce_exchange_triton import MISSING, arrived, begin_step, draw_step, empty_buffer, sendable
from .all_reduce_triton import max_programs
from .exchange import INT8_GROUP, INT8_LEAST_SCALE, INT8_PIECE, Exchange, int8_slot_bytes

NUM_WARPS = 8
NUM_REGISTERS = 128
PIECE = tl.constexpr(INT8_PIECE)
GROUP = tl.constexpr(INT8_GROUP)
LEAST_SCALE = tl.constexpr(INT8_LEAST_SCALE)
GROUPS = tl.constexpr(INT8_PIECE // INT8_GROUP)
STRIDE = tl.constexpr(INT8_PIECE + 4 * (INT8_PIECE // INT8_GROUP))  # bytes of a sent piece


@triton.jit
def _send(value, to):
    """Quantise a piece, fp32 [PIECE], and store it at the addresses `to` [R]; address 0 is skipped."""
    groups = tl.reshape(value, (GROUPS, GROUP))
    # Compared as integers, where NaN is the largest; a float maximum would skip it.
    largest = tl.max(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    scale = tl.where(largest < float("inf"), largest * (1.0 / 127), float("nan"))
    inverse = tl.where(scale > LEAST_SCALE, 1 / scale, 0.0)
    bytes = tl.reshape((groups * inverse[:, None] + 127.5).to(tl.int32).to(tl.int8), (PIECE,))
    there = (to != 0)[:, None]
    targets = tl.multiple_of(to.to(tl.pointer_type(tl.int8)), 16)[:, None] + tl.arange(0, PIECE)[None, :]
    tl.store(targets, bytes[None, :], mask=there)
    targets = tl.multiple_of((to + PIECE).to(tl.pointer_type(tl.int32)), 16)[:, None] + tl.arange(0, GROUPS)[None, :]
    tl.store(targets, sendable(scale)[None, :], mask=there)


@triton.jit
def _receive(at, state_ptr, alarm_ptr, limit):
    """(the piece at `at`, fp32 [PIECE], remaining spin limit); NaN where it did not arrive."""
    source = tl.multiple_of(at.to(tl.pointer_type(tl.int8)), 16) + tl.arange(0, PIECE)[None, :]
    bytes, limit = arrived(  # pyright: ignore[reportGeneralTypeIssues]
        source, tl.full((1, PIECE), True, tl.int1), 0, state_ptr, alarm_ptr, limit
    )
    source = tl.multiple_of((at + PIECE).to(tl.pointer_type(tl.int32)), 16) + tl.arange(0, GROUPS)[None, :]
    scale, limit = arrived(  # pyright: ignore[reportGeneralTypeIssues]
        source, tl.full((1, GROUPS), True, tl.int1), 0, state_ptr, alarm_ptr, limit
    )
    units = tl.where(bytes == MISSING, float("nan"), (bytes.to(tl.int32) & 255).to(tl.float32) - 127)
    scale = tl.reshape(scale, (GROUPS,)).to(tl.float32, bitcast=True)
    return tl.reshape(tl.reshape(units, (GROUPS, GROUP)) * scale[:, None], (PIECE,)), limit


@triton.jit(do_not_specialize=["num_pieces", "slice_pieces", "rank", "spin_limit"])
def _all_reduce_int8_kernel(
    x_ptr,
    peers_ptr,
    state_ptr,
    alarm_ptr,
    stride_buffer,
    stride_slot,
    numel,
    num_pieces,
    slice_pieces,
    rank,
    spin_limit,
    WORLD: tl.constexpr,
    PDL: tl.constexpr,
):
    """x <- the sum over ranks. A buffer, in bytes: [W slots, stride_slot] to be summed here, then as many of sums."""
    current, before = draw_step(state_ptr)  # pyright: ignore[reportGeneralTypeIssues]
    release_dependents(PDL)
    ranks, places = tl.arange(0, WORLD), tl.arange(0, PIECE)
    peers, here = tl.load(peers_ptr + ranks), tl.load(peers_ptr + rank)
    wait_for_inputs(PDL)
    to_empty, limit = begin_step(state_ptr, current, before, 2 * WORLD * stride_slot, spin_limit)
    peers += current * stride_buffer
    for piece in range(tl.program_id(0), slice_pieces, tl.num_programs(0)):
        for step in range(1, WORLD):
            to = (rank + step) % WORLD
            offsets = (to * slice_pieces + piece) * PIECE + places
            value = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
            there = (ranks == to) & (to * slice_pieces + piece < num_pieces)
            _send(value, tl.where(there, peers + rank * stride_slot + piece * STRIDE, 0))
    last = tl.multiple_of((here + before * stride_buffer).to(tl.pointer_type(tl.int8)), 16)
    empty_buffer(last, to_empty, PIECE)
    here += current * stride_buffer
    for piece in range(tl.program_id(0), slice_pieces, tl.num_programs(0)):
        if rank * slice_pieces + piece < num_pieces:
            offsets = (rank * slice_pieces + piece) * PIECE + places
            own = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
            total = tl.zeros((PIECE,), tl.float32)
            for sender in range(WORLD):
                if sender == rank:
                    total += own
                else:
                    value, limit = _receive(here + sender * stride_slot + piece * STRIDE, state_ptr, alarm_ptr, limit)
                    total += value
            _send(total, peers + (WORLD + rank) * stride_slot + piece * STRIDE)
    for piece in range(tl.program_id(0), slice_pieces, tl.num_programs(0)):
        for owner in range(WORLD):
            if owner * slice_pieces + piece < num_pieces:
                at = here + (WORLD + owner) * stride_slot + piece * STRIDE
                value, limit = _receive(at, state_ptr, alarm_ptr, limit)
                offsets = (owner * slice_pieces + piece) * PIECE + places
                tl.store(x_ptr + offsets, value.to(x_ptr.dtype.element_ty), mask=offsets < numel)


def all_reduce_int8_triton(x: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Sum contiguous x in place. Raises ValueError if a buffer is too small."""
    world_size, numel = exchange.world_size, x.numel()
    slot = int8_slot_bytes(numel, world_size)
    if 2 * world_size * slot > exchange.capacity:
        needed = 2 * world_size * slot
        raise ValueError(f"int8 sums of {numel} elements need {needed} bytes; a buffer has {exchange.capacity}")
    num_pieces = -(-numel // INT8_PIECE)
    slice_pieces = -(-num_pieces // world_size)
    memory = (exchange.peers, exchange.state, exchange.alarm)
    sizes = (exchange.capacity, slot, numel, num_pieces, slice_pieces)
    if numel:
        launch_kernel(
            _all_reduce_int8_kernel,
            (min(slice_pieces, max_programs(exchange.num_sms, NUM_WARPS, NUM_REGISTERS)),),
            (x, *memory, *sizes, exchange.rank, exchange.spin_limit),
            WORLD=world_size,
            num_warps=NUM_WARPS,
            maxnreg=NUM_REGISTERS,
            **pdl_launch(x),
        )
    return x
