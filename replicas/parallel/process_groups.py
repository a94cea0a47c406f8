"""Process groups of a rank, over the store of a model copy.

Each has its own communicator and connections, and can be aborted alone, unlike torch's default
group.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch

from .c10d import PrefixStore, ProcessGroup, Store, TCPStore, gloo_group, nccl_group

# A collective waits for the slowest rank. Ranks start a step within milliseconds, but compiling a
# kernel at its first launch may take a minute. The engine's watchdog is quicker.
_TIMEOUT = timedelta(minutes=5)


class ProcessGroups:
    """Groups of rank `rank`, in opening order: gloo on a CPU, NCCL on a GPU. host: the address others connect to."""

    def __init__(self, store: Store, rank: int, device: torch.device, host: str) -> None:
        self._store, self._rank, self._device, self._host = store, rank, device, host
        self._groups: list[ProcessGroup] = []

    def open(self, name: str, ranks: Sequence[int], *, connect: bool = True) -> ProcessGroup:
        """Open the group of these world ranks, in their order, and wait for them.

        `name` is unique. Ranks that share groups open them in one order. Without `connect`,
        GPU ranks connect at their first transfer. Raises torch's RuntimeError if a rank is
        missing or unreachable.
        """
        store, rank = PrefixStore(name, self._store), list(ranks).index(self._rank)
        if self._device.type == "cuda":
            group = nccl_group(store, name, ranks, rank, self._device, _TIMEOUT, connect=connect)
        else:
            group = gloo_group(store, name, rank, len(ranks), self._host, _TIMEOUT)
        self._groups.append(group)
        return group

    def abort(self) -> None:
        """Abort all groups, even during a collective."""
        for group in self._groups:
            with contextlib.suppress(RuntimeError):  # abort the others in any case
                group.abort()


def open_store(host: str) -> tuple[TCPStore, int]:
    """A store that listens on `host` only, and its port. Raises OSError if `host` is not this machine's."""
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()), port


def local_host(address: tuple[str, int]) -> str:
    """This machine's address on the route to `address`. Raises OSError."""
    with socket.create_connection(address, timeout=10.0) as sock:
        return sock.getsockname()[0]
