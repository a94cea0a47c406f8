"""The symmetric memory of the all-reduce kernels: its layout, the size of a message in it, and one rank's view of it.

Legends as in all_reduce.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

NUM_BUFFERS = 3
STATE_SIZE = 2 + NUM_BUFFERS  # tickets drawn, bytes written in each buffer, failed
_ALIGNMENT = 16  # elements: a slot begins where a wide store may
INT8_GROUP = 128  # elements that share a scale
INT8_PIECE = 4096  # elements that travel together
INT8_LEAST_SCALE = 1e-37  # its inverse is finite; what is smaller is sent as zero
_PIECES = (1024, 2048)  # elements of what is a row where a message is not normed: of small messages, of large ones
_SMALL = 1 << 18  # elements


class Algorithm(Enum):
    ONE_SHOT = "one_shot"
    TWO_SHOT = "two_shot"


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one rank's kernels know of the ranks' memory.

    Every rank has NUM_BUFFERS buffers of `capacity` bytes one after the other, all bits set at the start: `memory` is
    its own. `peers` [W] int64: where they begin for each rank, as addresses valid on this device. `state` [STATE_SIZE]
    int64, zeros at the start. `alarm` [1] int32, where the host reads it without a copy: not 0 once a wait ended after
    `spin_limit` turns. `num_sms`: SMs of this device.
    """

    rank: int
    world_size: int
    capacity: int
    memory: torch.Tensor
    peers: torch.Tensor
    state: torch.Tensor
    alarm: torch.Tensor
    spin_limit: int
    num_sms: int


def as_rows(numel: int) -> tuple[int, int]:
    """(rows, elements of each) of a message that is not normed; the last row may be short."""
    piece = min(_PIECES[numel > _SMALL], max(_ALIGNMENT, 1 << (numel - 1).bit_length()))
    return math.ceil(numel / piece), piece


def slot_size(algorithm: Algorithm, num_rows: int, num_features: int, world_size: int) -> int:
    """Elements of one slot of a buffer: a message of [num_rows, num_features], or a rank's slice of it."""
    rows = num_rows if algorithm is Algorithm.ONE_SHOT else math.ceil(num_rows / world_size)
    return math.ceil(rows * num_features / _ALIGNMENT) * _ALIGNMENT


def buffer_bytes(algorithm: Algorithm, num_rows: int, num_features: int, itemsize: int, world_size: int) -> int:
    """Bytes of a buffer that a message of [num_rows, num_features] takes."""
    slots = world_size if algorithm is Algorithm.ONE_SHOT else 2 * world_size
    return slots * slot_size(algorithm, num_rows, num_features, world_size) * itemsize


def int8_slot_bytes(numel: int, world_size: int) -> int:
    """Bytes of one slot of a buffer, a rank's slice of a message of `numel` elements in 8 bits with its scales."""
    pieces = math.ceil(numel / INT8_PIECE)
    return math.ceil(pieces / world_size) * (INT8_PIECE + 4 * (INT8_PIECE // INT8_GROUP))


def int8_part_size(capacity: int, world_size: int) -> int:
    """Elements of the largest message that buffers of `capacity` bytes hold in 8 bits."""
    return capacity // (2 * int8_slot_bytes(INT8_PIECE, world_size) * world_size) * world_size * INT8_PIECE
