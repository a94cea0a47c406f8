"""Collectives whose sums over ranks are taken over symmetric memory, where that is faster than NCCL.

`open_collectives` gives a group what its configuration asks for and its machine can do. The table of sizes is that of
kernels/comm/all_reduce.py; what is too large for it, and everything that is not a sum, goes to the plain collectives.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ...kernels.comm.all_reduce import (
    DTYPES,
    INT8_ABOVE_KIB,
    LIMITS_KIB,
    NUM_BUFFERS,
    STATE_SIZE,
    WORLD_SIZES,
    Algorithm,
    Exchange,
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_int8,
    as_rows,
    buffer_bytes,
    choose,
    int8_part_size,
)
from ...kernels.linear.rms_norm import add_rms_norm
from ..errors import ShardGroupError
from .c10d import Store
from .collectives import Collectives
from .symmetric_memory import NoSymmetricMemory, SymmetricMemory, open_symmetric_memory

logger = logging.getLogger(__name__)

# Turns of a wait before it ends, some 0.5 us each on an H200: 260 s, of the order of the limit that NCCL has. Ranks
# start at different speeds, and once they serve the engine's watchdog is far quicker.
_SPIN_LIMIT = 1 << 29
_LONGEST_ROW = 1 << 16  # bytes
_SYMM_MEM_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Group:
    """A tensor-parallel group as one of its ranks sees it. `name` is the group's own in `store`, and in the process."""

    store: Store
    name: str
    rank: int
    world_size: int
    device: torch.device


def open_collectives(
    plain: Collectives, group: Group, kind: str = "auto", *, quantized: bool = False, batch_invariant: bool = False
) -> Collectives:
    """What sums for a group. `kind` and `quantized` are `all_reduce` and `quantized_all_reduce` of ParallelConfig.

    Every rank calls it with the same arguments. batch_invariant: messages of all sizes are summed in one order. `plain`
    itself is the answer where NCCL is asked for, on a CPU, and, with a warning that says why, where the ranks cannot
    write each other's memory. Raises ShardGroupError where they cannot and what is asked for needs it.
    """
    if kind == "nccl" or group.device.type != "cuda":
        return plain
    try:
        if group.world_size not in WORLD_SIZES:
            raise NoSymmetricMemory(f"its kernels are for {WORLD_SIZES} ranks, and there are {group.world_size}")
        capacity = buffer_capacity(group.world_size)
        memory = open_symmetric_memory(
            group.store, group.name, group.rank, group.world_size, group.device, NUM_BUFFERS * capacity
        )
    except NoSymmetricMemory as none:
        if kind != "auto":
            raise ShardGroupError(f"all_reduce {kind!r} cannot be had: {none}; use auto or nccl") from none
        if batch_invariant and group.world_size > 2:  # two numbers have one sum
            raise ShardGroupError(
                f"batch_invariant cannot be had of {group.world_size} ranks over NCCL: {none}"
            ) from none
        logger.warning("%s has no symmetric memory, and all its sums are left to NCCL: %s", group.name, none)
        return plain
    if kind == "symm_mem":
        return TorchSymmetricCollectives(plain, memory)
    exchange = Exchange(
        rank=group.rank,
        world_size=group.world_size,
        capacity=capacity,
        memory=memory.own,
        peers=torch.tensor(memory.addresses, dtype=torch.int64, device=group.device),
        state=torch.zeros(STATE_SIZE, dtype=torch.int64, device=group.device),
        # The kernels write into it when a wait has failed; on the host, it can be looked at without a copy.
        alarm=torch.zeros(1, dtype=torch.int32, pin_memory=True),
        spin_limit=_SPIN_LIMIT,
        multiprocessors=torch.cuda.get_device_properties(group.device).multi_processor_count,
    )
    every_size = batch_invariant or kind == "triton"
    return SymmetricCollectives(plain, exchange, every_size=every_size, quantized=quantized, fused=not batch_invariant)


def buffer_capacity(world_size: int) -> int:
    """Bytes of a buffer that holds every message of the table, slices being a row longer than their share of it."""
    one_shot, two_shot = LIMITS_KIB[world_size]
    return (max(world_size * one_shot, 2 * two_shot) << 10) + 2 * world_size * _LONGEST_ROW


class SymmetricCollectives:
    """By the kernels of kernels/comm/all_reduce.py for messages of their table, by `plain` for all others.

    every_size: larger ones too, in parts. quantized: those above INT8_ABOVE_KIB, in parts and with 8 bits an element.
    fused: a norm that follows is a part of the kernel; apart from it, all messages are normed by one kernel, to the
    same bits.
    """

    def __init__(
        self,
        plain: Collectives,
        exchange: Exchange,
        *,
        every_size: bool = False,
        quantized: bool = False,
        fused: bool = True,
    ) -> None:
        self._plain, self._exchange, self._fused = plain, exchange, fused
        self._every_size, self._quantized = every_size and not quantized, quantized
        self._alarm = exchange.alarm.numpy()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        algorithm = self._choose(x)
        if algorithm is not None:
            flat = x.view(-1)
            for part in (flat,) if self._holds(algorithm, *as_rows(x.numel()), x) else flat.split(self._part_size(x)):
                all_reduce(part, self._exchange, algorithm)
        elif self._goes_in_8_bits(x):
            for part in x.view(-1).split(int8_part_size(self._exchange.capacity, self._exchange.world_size)):
                all_reduce_int8(part, self._exchange)
        else:
            self._plain.all_reduce(x)
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        algorithm = self._choose(x) if self._fused else None
        if algorithm is not None and self._holds(algorithm, x.numel() // x.shape[-1], x.shape[-1], x):
            return all_reduce_add_rms_norm(x, residual, weight, eps, self._exchange, algorithm)
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._plain.all_gather(x)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return self._plain.all_to_all(x)

    def check(self) -> None:
        if self._alarm[0]:
            raise ShardGroupError(
                f"rank {self._exchange.rank} of {self._exchange.world_size} has waited {self._exchange.spin_limit} "
                "turns, some 0.5 us each, for another rank's part of a sum; look at the other ranks' logs"
            )

    def _choose(self, x: torch.Tensor) -> Algorithm | None:
        algorithm = choose(x.nbytes, self._exchange.world_size)
        if not self._takes(x) or self._goes_in_8_bits(x):
            return None
        return Algorithm.TWO_SHOT if algorithm is None and self._every_size else algorithm

    def _goes_in_8_bits(self, x: torch.Tensor) -> bool:
        return self._quantized and self._takes(x) and x.nbytes > INT8_ABOVE_KIB << 10

    def _takes(self, x: torch.Tensor) -> bool:
        return x.is_contiguous() and x.dtype in DTYPES and x.numel() > 0

    def _holds(self, algorithm: Algorithm, num_rows: int, num_features: int, x: torch.Tensor) -> bool:
        needed = buffer_bytes(algorithm, num_rows, num_features, x.itemsize, self._exchange.world_size)
        return needed <= self._exchange.capacity

    def _part_size(self, x: torch.Tensor) -> int:
        """Elements that a buffer surely holds, in two shots: a power of two, so that all slices are alike."""
        size = 1 << (self._exchange.capacity // (2 * x.itemsize)).bit_length() - 1
        return size if as_rows(size)[0] >= self._exchange.world_size else size // self._exchange.world_size


class TorchSymmetricCollectives:
    """Sums by torch's operators over symmetric memory, `torch.ops.symm_mem`, up to the table's largest message."""

    def __init__(self, plain: Collectives, memory: SymmetricMemory) -> None:
        self._plain, self._memory = plain, memory
        self._world_size = len(memory.addresses)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        algorithm = choose(x.nbytes, self._world_size)
        aligned = x.is_contiguous() and x.nbytes % (16 * self._world_size) == 0
        if algorithm is None or not aligned or x.dtype not in _SYMM_MEM_DTYPES or x.nbytes > self._memory.own.nbytes:
            return self._plain.all_reduce(x)
        shared = self._memory.own[: x.nbytes].view(x.dtype)
        if algorithm is Algorithm.ONE_SHOT:
            total = torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x.view(-1), "sum", self._memory.group_name)
        else:
            shared.copy_(x.view(-1))
            total = torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._memory.group_name)
        x.view(-1).copy_(total)
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._plain.all_gather(x)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return self._plain.all_to_all(x)

    def check(self) -> None:
        self._plain.check()
