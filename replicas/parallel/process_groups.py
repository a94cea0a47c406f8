"""Process groups of a rank, made over the store in which the ranks of a model copy meet.

torch's default group is not used: each group is an object with its own communicator, its own connections and its own
end, which may be an abort.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Backend, PrefixStore, ProcessGroup, ProcessGroupGloo, Store, TCPStore

# A collective waits for the slowest rank of its group. Those of one step start within milliseconds of each other; a
# rank that still compiles a kernel at its first launch may take a minute longer. The engine's watchdog is quicker.
_TIMEOUT = timedelta(minutes=5)


class ProcessGroups:
    """The groups of rank `rank`, in order of their opening: gloo for a rank on CPU, NCCL for one on a GPU.

    host: the address of this machine that other ranks reach; gloo listens on it and nowhere else.
    """

    def __init__(self, store: Store, rank: int, device: torch.device, host: str) -> None:
        self._store, self._rank, self._device, self._host = store, rank, device, host
        self._groups: list[ProcessGroup] = []

    def open(self, name: str, ranks: Sequence[int], *, connect: bool = True) -> ProcessGroup:
        """The group of these world ranks, of which this rank is one, in their order. Waits for all of them.

        `name` is of this group alone. Ranks that share several groups open them in the same order. Without `connect`
        ranks with GPUs wait for each other at their first exchange. Raises RuntimeError (torch's) where one does not
        come, or is not reached.
        """
        store = PrefixStore(name, self._store)
        rank, size = list(ranks).index(self._rank), len(ranks)
        group = ProcessGroup(store, rank, size)
        group._set_group_name(name)  # pyright: ignore[reportArgumentType]
        if self._device.type == "cuda":
            kind, backend = ProcessGroup.BackendType.NCCL, self._nccl(store, name, ranks, connect)
        else:
            kind, backend = ProcessGroup.BackendType.GLOO, self._gloo(store, rank, size)
        group._set_default_backend(kind)
        group._register_backend(self._device, kind, backend)
        self._groups.append(group)
        return group

    def _nccl(self, store: Store, name: str, ranks: Sequence[int], connect: bool) -> Backend:
        from torch.distributed import ProcessGroupNCCL  # absent from a torch that was built without CUDA

        options = ProcessGroupNCCL.Options()
        options._timeout = _TIMEOUT
        options.global_ranks_in_group = list(ranks)
        options.group_name = name  # pyright: ignore[reportAttributeAccessIssue]
        backend = ProcessGroupNCCL(store, list(ranks).index(self._rank), len(ranks), options)
        if connect:  # here, and not by the first collective: that one may stand in a CUDA graph
            backend.eager_connect_single_device(self._device)
        return backend

    def _gloo(self, store: Store, rank: int, size: int) -> Backend:
        options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._devices = [ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = _TIMEOUT
        return ProcessGroupGloo(store, rank, size, options)

    def abort(self) -> None:
        """End all groups at once, also while a collective waits in another thread."""
        for group in self._groups:
            with contextlib.suppress(RuntimeError):  # the others are to end all the same
                group.abort()


def open_store(host: str) -> tuple[TCPStore, int]:
    """A store that listens on `host` alone, and the port that the system chose for it.

    Raises OSError where `host` is no address of this machine.
    """
    family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()), port


def local_host(address: tuple[str, int]) -> str:
    """This machine's address on the way to `address`, where somebody listens. Raises OSError."""
    with socket.create_connection(address, timeout=10.0) as sock:
        return sock.getsockname()[0]
