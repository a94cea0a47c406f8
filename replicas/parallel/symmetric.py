"""All-reduce over symmetric memory, for sizes where it beats NCCL.

kernels/comm/all_reduce.py has the table of sizes; larger messages and other collectives use the
plain backend.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ...kernels.comm.all_reduce import (
    DTYPES,
    INT8_ABOVE_KIB,
    LIMITS_KIB,
    WORLD_SIZES,
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_int8,
    choose,
)
from ...kernels.comm.exchange import NUM_BUFFERS, STATE_SIZE, Algorithm, Exchange, as_rows, buffer_bytes, int8_part_size
from ...kernels.linear.rms_norm import add_rms_norm
from ..errors import ShardGroupError
from .c10d import Store
from .collectives import Collectives
from .symmetric_memory import NoSymmetricMemory, SymmetricMemory, open_symmetric_memory

logger = logging.getLogger(__name__)

# Spin-wait iterations before the timeout, about 0.5 us each on an H200: 260 s, near NCCL's, since
# ranks start at different speeds. While serving, the engine's watchdog is far quicker.
_SPIN_LIMIT = 1 << 29
_LONGEST_ROW = 1 << 16  # bytes
_SYMM_MEM_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's tensor-parallel group. `name` is unique in `store` and the process."""

    store: Store
    name: str
    rank: int
    world_size: int
    device: torch.device


def open_collectives(
    plain: Collectives, group: Group, kind: str = "auto", *, quantized: bool = False, batch_invariant: bool = False
) -> Collectives:
    """The collectives of a group. kind, quantized: `all_reduce` and `quantized_all_reduce` of
    ParallelConfig.

    Every rank passes the same arguments. batch_invariant: one summation order for all sizes.
    Returns `plain` for "nccl" and on a CPU. Without symmetric memory it warns and returns
    `plain`, or raises ShardGroupError if the arguments require it.
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
            raise ShardGroupError(f"all_reduce {kind!r} is not available: {none}; use auto or nccl") from none
        if batch_invariant and group.world_size > 2:  # two terms have one summation order
            raise ShardGroupError(
                f"batch_invariant is not available for {group.world_size} ranks over NCCL: {none}"
            ) from none
        logger.warning("%s has no symmetric memory; NCCL does every all-reduce: %s", group.name, none)
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
        # Kernels set it at a timeout. In host memory, it is read without a copy.
        alarm=torch.zeros(1, dtype=torch.int32, pin_memory=True),
        spin_limit=_SPIN_LIMIT,
        num_sms=torch.cuda.get_device_properties(group.device).multi_processor_count,
    )
    every_size = batch_invariant or kind == "triton"
    return SymmetricCollectives(plain, exchange, every_size=every_size, quantized=quantized, fused=not batch_invariant)


def buffer_capacity(world_size: int) -> int:
    """Buffer bytes for the table's messages; a slice may exceed its share by one row."""
    one_shot, two_shot = LIMITS_KIB[world_size]
    return (max(world_size * one_shot, 2 * two_shot) << 10) + 2 * world_size * _LONGEST_ROW


class SymmetricCollectives:
    """Kernels of kernels/comm/all_reduce.py for the table's messages, `plain` for others.

    every_size: larger messages too, in parts. quantized: those above INT8_ABOVE_KIB in parts,
    with 8 bits an element. fused: the kernel includes the following norm; otherwise one kernel
    norms all sizes, to the same bits.
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
            for part in (flat,) if self._fits(algorithm, *as_rows(x.numel()), x) else flat.split(self._part_size(x)):
                all_reduce(part, self._exchange, algorithm)
        elif self._is_quantized(x):
            for part in x.view(-1).split(int8_part_size(self._exchange.capacity, self._exchange.world_size)):
                all_reduce_int8(part, self._exchange)
        else:
            self._plain.all_reduce(x)
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        algorithm = self._choose(x) if self._fused else None
        if algorithm is not None and self._fits(algorithm, x.numel() // x.shape[-1], x.shape[-1], x):
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
                "turns of about 0.5 us each for another rank's part of an all-reduce; look at the other ranks' logs"
            )

    def _choose(self, x: torch.Tensor) -> Algorithm | None:
        algorithm = choose(x.nbytes, self._exchange.world_size)
        if not self._supports(x) or self._is_quantized(x):
            return None
        return Algorithm.TWO_SHOT if algorithm is None and self._every_size else algorithm

    def _is_quantized(self, x: torch.Tensor) -> bool:
        return self._quantized and self._supports(x) and x.nbytes > INT8_ABOVE_KIB << 10

    def _supports(self, x: torch.Tensor) -> bool:
        return x.is_contiguous() and x.dtype in DTYPES and x.numel() > 0

    def _fits(self, algorithm: Algorithm, num_rows: int, num_features: int, x: torch.Tensor) -> bool:
        needed = buffer_bytes(algorithm, num_rows, num_features, x.itemsize, self._exchange.world_size)
        return needed <= self._exchange.capacity

    def _part_size(self, x: torch.Tensor) -> int:
        """Elements per two-shot buffer; a power of two, so that slices are equal."""
        size = 1 << (self._exchange.capacity // (2 * x.itemsize)).bit_length() - 1
        return size if as_rows(size)[0] >= self._exchange.world_size else size // self._exchange.world_size


class TorchSymmetricCollectives:
    """All-reduce by `torch.ops.symm_mem`, up to the table's largest message."""

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
