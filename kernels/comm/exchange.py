"""Layout of the all-reduce kernels' symmetric memory; legends as in all_reduce.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

NUM_BUFFERS = 3
STATE_SIZE = 2 + NUM_BUFFERS  # tickets drawn, bytes written in each buffer, failed
_ALIGNMENT = 16  # elements, for wide stores
INT8_GROUP = 128  # elements that share a scale
INT8_PIECE = 4096  # elements sent together
INT8_LEAST_SCALE = 1e-37  # its inverse is finite; smaller values are sent as zero
_PIECES = (1024, 2048)  # elements of a row without a norm: small, large messages
_SMALL = 1 << 18  # elements


class Algorithm(Enum):
    ONE_SHOT = "one_shot"
    TWO_SHOT = "two_shot"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One rank's view of the symmetric memory.

    `memory`: NUM_BUFFERS contiguous buffers of `capacity` bytes, initially all bits set. `peers` [W] int64:
    each rank's memory as addresses on this device. `state` [STATE_SIZE] int64, initially 0. `alarm` [1]
    int32, host-visible: not 0 once a wait exceeded `spin_limit` iterations.
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
    """(rows, elements per row) of a message without a norm; the last row may be short."""
    piece = min(_PIECES[numel > _SMALL], max(_ALIGNMENT, 1 << (numel - 1).bit_length()))
    return math.ceil(numel / piece), piece


def slot_size(algorithm: Algorithm, num_rows: int, num_features: int, world_size: int) -> int:
    """Elements of a slot: a message [num_rows, num_features], or a rank's slice of it."""
    rows = num_rows if algorithm is Algorithm.ONE_SHOT else math.ceil(num_rows / world_size)
    return math.ceil(rows * num_features / _ALIGNMENT) * _ALIGNMENT


def buffer_bytes(algorithm: Algorithm, num_rows: int, num_features: int, itemsize: int, world_size: int) -> int:
    """Bytes of a buffer for a message [num_rows, num_features]."""
    slots = world_size if algorithm is Algorithm.ONE_SHOT else 2 * world_size
    return slots * slot_size(algorithm, num_rows, num_features, world_size) * itemsize


def int8_slot_bytes(numel: int, world_size: int) -> int:
    """Bytes of a rank's slice of `numel` elements in 8 bits with scales."""
    pieces = math.ceil(numel / INT8_PIECE)
    return math.ceil(pieces / world_size) * (INT8_PIECE + 4 * (INT8_PIECE // INT8_GROUP))


def int8_part_size(capacity: int, world_size: int) -> int:
    """The most 8-bit elements that buffers of `capacity` bytes hold."""
    return capacity // (2 * int8_slot_bytes(INT8_PIECE, world_size) * world_size) * world_size * INT8_PIECE
