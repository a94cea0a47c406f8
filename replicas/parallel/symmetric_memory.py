"""GPU memory that other ranks can write: torch's symmetric memory.

Ranks agree through a store: all get it, or all get the same reason. NVLink multicast is not used;
torch sets it up if it can, unless TORCH_SYMM_MEM_DISABLE_MULTICAST=1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch

from ..device import this_machine
from .c10d import ProcessGroup, Store, empty_symmetric, named_group, rendezvous

_TIMEOUT = timedelta(minutes=5)  # ranks load at different speeds


class NoSymmetricMemory(Exception):
    """One rank cannot write another's memory; the message names both and the reason."""


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's host and GPU."""

    host: str
    boot: str  # of the host's kernel: hosts may share a name
    device: str  # GPU UUID

    @classmethod
    def of(cls, device: torch.device) -> Place:
        return cls(*this_machine(), str(torch.cuda.get_device_properties(device).uuid))


@dataclass(frozen=True, slots=True)
class SymmetricMemory:
    """own: uint8 [bytes] of this rank, freed with the tensor. addresses: every rank's, as this device sees them."""

    own: torch.Tensor
    addresses: tuple[int, ...]
    group_name: str
    group: ProcessGroup  # torch finds it by name while it is referenced


def why_unreachable(places: Sequence[Place], rank: int, has_access: Callable[[str], bool | None]) -> str:
    """Why `rank` cannot write the memory of all others; empty if it can.

    has_access(uuid): peer access to that GPU; None if the process does not see it.
    """
    own = places[rank]
    for peer, place in enumerate(places):
        if peer == rank:
            continue
        if (place.host, place.boot) != (own.host, own.boot):
            return f"ranks {rank} and {peer} are on two machines, {own.host} and {place.host}"
        access = has_access(place.device)
        if access is None:
            return f"the process of rank {rank} does not see GPU {place.device} of rank {peer}; check what masks it"
        if not access:
            return f"GPU {own.device} of rank {rank} has no peer access to GPU {place.device} of rank {peer}"
    return ""


def open_symmetric_memory(
    store: Store, name: str, rank: int, world_size: int, device: torch.device, num_bytes: int
) -> SymmetricMemory:
    """Allocate `num_bytes` per device, all bits set; every rank of group `name` calls it.

    Raises NoSymmetricMemory, with one reason on all ranks, and torch's RuntimeError if a rank
    is missing for 5 minutes.
    """

    def exchange(what: str, value: str) -> list[str]:
        keys = [f"symmetric memory {name} {what} {r}" for r in range(world_size)]
        store.set(keys[rank], value)
        store.wait(keys, _TIMEOUT)
        return [store.get(key).decode() for key in keys]

    def agree(what: str, reason: str) -> None:
        if reasons := [each for each in exchange(what, reason) if each]:
            raise NoSymmetricMemory(reasons[0])

    places = [Place(**json.loads(each)) for each in exchange("place", json.dumps(asdict(Place.of(device))))]
    agree("access", why_unreachable(places, rank, lambda uuid: _has_access(device, uuid)))
    group_name, own, addresses, reason = f"shoal {name}", torch.empty(0), (), ""
    group = named_group(store, group_name, rank, world_size)
    try:
        own = empty_symmetric(num_bytes, device)
        own.fill_(255)
        torch.cuda.synchronize(device)
        addresses = rendezvous(own, group_name)
    except RuntimeError as error:
        reason = f"rank {rank} has no symmetric memory of {num_bytes} bytes: {error}"
    if not reason and own.data_ptr() != addresses[rank]:
        reason = f"rank {rank} has its symmetric memory at {own.data_ptr():#x}, and torch says {addresses[rank]:#x}"
    agree("memory", reason)
    return SymmetricMemory(own, addresses, group_name, group)


def _has_access(device: torch.device, uuid: str) -> bool | None:
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return torch.cuda.can_device_access_peer(device, index)
    return None
