"""Device functions of the all-reduce kernels that exchange data through symmetric memory without flags.

A rank's buffers are filled with MISSING words, all bits set: a NaN in every floating type. A message's NaN
with these bits is sent as another. A rank pushes its words into the others' buffers and polls its own until
no word is missing: one hop, no flag.

Three buffers rotate. During step s a faster rank may already write the buffer of s + 1. Step s empties the
buffer of s - 1: no rank writes it before s + 2, which starts after this rank has started s + 1.

The device counts the steps, so a graph can be replayed: a launch draws TICKETS tickets from one counter,
while the preceding kernel still runs. State, int64: tickets drawn | bytes written in each of three buffers
| 1 once something did not arrive.

After `spin_limit` iterations, some 0.5 us each on an H200, the kernel sets the failure in its state and in
host-visible memory. Missing words become NaN; later waits return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exchange import NUM_BUFFERS

TICKETS = tl.constexpr(1 << 16)
BUFFERS = tl.constexpr(NUM_BUFFERS)
MISSING = tl.constexpr(-1)  # never sent, in int8, int16 and int32
FAILED = tl.constexpr(1 + NUM_BUFFERS)


@triton.jit
def sendable(value):
    """The bits of `value` as integers, MISSING replaced by the largest positive integer, also a NaN."""
    if value.dtype.primitive_bitwidth == 32:
        words = value.to(tl.int32, bitcast=True)
        return tl.where(words == MISSING, 0x7FFFFFFF, words)
    else:
        words = value.to(tl.int16, bitcast=True)
        return tl.where(words == MISSING, 0x7FFF, words).to(tl.int16)


@triton.jit
def pointers_to_words(addresses, x_ptr):
    """Addresses as pointers to integers of x's size."""
    if x_ptr.dtype.element_ty.primitive_bitwidth == 32:
        return tl.multiple_of(addresses.to(tl.pointer_type(tl.int32)), 16)
    else:
        return tl.multiple_of(addresses.to(tl.pointer_type(tl.int16)), 16)


@triton.jit
def draw_step(state_ptr):
    """(buffer of this step, buffer to empty). Call it before `release_dependents`: the next step must draw later."""
    num_programs = tl.num_programs(0)
    share = TICKETS // num_programs
    drawn = tl.where(tl.program_id(0) == 0, TICKETS - share * (num_programs - 1), share)
    step = tl.atomic_add(state_ptr, drawn.to(tl.int64), sem="relaxed") // TICKETS
    return (step % BUFFERS).to(tl.int32), ((step + BUFFERS - 1) % BUFFERS).to(tl.int32)


@triton.jit
def begin_step(state_ptr, current, before, num_bytes, spin_limit):
    """(bytes to empty, spin limit); records that the step writes `num_bytes`."""
    to_empty = tl.multiple_of(tl.load(state_ptr + 1 + before).to(tl.int32), 32)  # slots have multiples of 16 words
    failed = tl.load(state_ptr + FAILED)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + 1 + current, num_bytes.to(tl.int64))
    return to_empty, tl.where(failed != 0, 0, spin_limit)


@triton.jit
def empty_buffer(buffer_ptr, num_words, BLOCK_N: tl.constexpr):
    """Set the first `num_words` of a buffer to MISSING, split over programs."""
    for start in range(tl.program_id(0) * BLOCK_N, num_words, tl.num_programs(0) * BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        tl.store(buffer_ptr + places, MISSING, mask=places < num_words)


@triton.jit
def _missing(words):
    """1 if any word is missing, else 0."""
    return tl.max(tl.max((words == MISSING).to(tl.int32), axis=0), axis=0)


@triton.jit
def arrived(pointers, mask, own, state_ptr, alarm_ptr, spin_limit):
    """(the words once all arrived, remaining spin limit). Where `mask` is false: `own`."""
    words = tl.load(pointers, mask=mask, other=own, volatile=True)
    missing = _missing(words)
    spins = 0
    while (missing != 0) & (spins < spin_limit):
        words = tl.load(pointers, mask=mask, other=own, volatile=True)
        missing = _missing(words)
        spins += 1
    if missing != 0:
        tl.store(state_ptr + FAILED, 1)
        tl.store(alarm_ptr, 1)
    return words, tl.where(missing != 0, 0, spin_limit)
