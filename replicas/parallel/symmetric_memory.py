"""Memory of a GPU that the other ranks of a group can write, by torch's symmetric memory.

The ranks agree first on whether it can be had: all of them get it, or all of them the same reason why not. What they
say to each other goes through a store. NVLink multicast is not used; torch prepares it where it can, unless
TORCH_SYMM_MEM_DISABLE_MULTICAST=1 says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch

from ..device import this_machine
from .c10d import ProcessGroup, Store, empty_symmetric, named_group, rendezvous

_TIMEOUT = timedelta(minutes=5)  # the ranks do this at the same point of their start, but load at different speeds


class NoSymmetricMemory(Exception):
    """A rank cannot write another one's memory; says which, and why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    host: str
    boot: str  # of the host's kernel: two hosts may have one name
    device: str  # the GPU's UUID

    @classmethod
    def of(cls, device: torch.device) -> Place:
        return cls(*this_machine(), str(torch.cuda.get_device_properties(device).uuid))


@dataclass(frozen=True, slots=True)
class SymmetricMemory:
    """`own` uint8 [bytes] is this rank's; `addresses` [W] those of every rank's, as this device sees them.

    The memory goes when `own` does.
    """

    own: torch.Tensor
    addresses: tuple[int, ...]
    group_name: str
    group: ProcessGroup  # found by its name, until nobody has it any more


def why_unreachable(places: Sequence[Place], rank: int, has_access: Callable[[str], bool | None]) -> str:
    """Why `rank` cannot write the memory of all others; empty where it can.

    has_access(uuid): whether its device reaches that one; None where its process does not see that device.
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
    """`num_bytes` on each rank's device, all bits set. `name`: of the group, in this process and in the store.

    Every rank of the group calls it. Raises NoSymmetricMemory, on all of them for one reason, and torch's RuntimeError
    where one does not come within 5 minutes.
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
