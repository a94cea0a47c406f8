"""Private interfaces of torch.distributed, which another torch version may change."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    Backend,
    FileStore,
    PrefixStore,
    ProcessGroup,
    ProcessGroupGloo,
    Store,
    TCPStore,
    _register_process_group,
)

__all__ = ["FileStore", "PrefixStore", "ProcessGroup", "Store", "TCPStore"]


def gloo_group(store: Store, name: str, rank: int, size: int, host: str, timeout: timedelta) -> ProcessGroup:
    """A group of CPU ranks; gloo listens on `host` only."""
    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timeout
    backend = ProcessGroupGloo(store, rank, size, options)
    return _group(store, name, rank, size, torch.device("cpu"), ProcessGroup.BackendType.GLOO, backend)


def nccl_group(
    store: Store, name: str, ranks: Sequence[int], rank: int, device: torch.device, timeout: timedelta, *, connect: bool
) -> ProcessGroup:
    """A group of the world ranks `ranks`, each with a GPU. rank: index in the group.

    connect: now, because the first collective may be inside a CUDA graph.
    """
    from torch.distributed import ProcessGroupNCCL  # absent without CUDA

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    options.global_ranks_in_group = list(ranks)
    options.group_name = name  # pyright: ignore[reportAttributeAccessIssue]
    backend = ProcessGroupNCCL(store, rank, len(ranks), options)
    if connect:
        backend.eager_connect_single_device(device)
    return _group(store, name, rank, len(ranks), device, ProcessGroup.BackendType.NCCL, backend)


def _group(
    store: Store,
    name: str,
    rank: int,
    size: int,
    device: torch.device,
    kind: ProcessGroup.BackendType,
    backend: Backend,
) -> ProcessGroup:
    group = ProcessGroup(store, rank, size)
    group._set_group_name(name)  # pyright: ignore[reportArgumentType]
    group._set_default_backend(kind)
    group._register_backend(device, kind, backend)
    return group


def named_group(store: Store, name: str, rank: int, size: int) -> ProcessGroup:
    """A group without backend, which torch's symmetric memory finds by name: rank, size and store."""
    group = ProcessGroup(PrefixStore(name, store), rank, size)
    _register_process_group(name, group)  # pyright: ignore[reportArgumentType]
    return group


def all_gather_into(group: ProcessGroup, out: torch.Tensor, x: torch.Tensor) -> None:
    """Gather contiguous x of every rank into contiguous `out`; torch's public name changed in 2.13."""
    options = AllgatherOptions()
    options.asyncOp = False
    work = group._allgather_base(out.view(-1), x.view(-1), options)
    if work is not None:
        work.wait()


def empty_symmetric(num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] that `rendezvous` can map into other processes.

    Not symm_mem.empty(): since torch 2.12 it returns a slice of a pool; the operators need a
    whole allocation.
    """
    from torch._C._distributed_c10d import _SymmetricMemory  # absent without CUDA

    return _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)


def rendezvous(own: torch.Tensor, group_name: str) -> tuple[int, ...]:
    """Addresses of every rank's symmetric memory, as this device sees them."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return tuple(_SymmetricMemory.rendezvous(own, group_name).buffer_ptrs)
