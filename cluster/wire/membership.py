"""Which replicas there are. Addresses and facts only: loads travel over the replicas' own connections."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A replica's address and the facts about its engine that do not change while it lives.

    `epoch` is drawn at start, so that a restarted replica is never taken for the one before it.
    """

    replica_id: str
    model_id: str
    host: str
    port: int
    epoch: int = 0
    draining: bool = False
    max_model_len: int = 0
    vocab_size: int = 0
    num_blocks: int = 0
    block_size: int = 16
    max_num_seqs: int = 256
    dtype: str = ""
    num_parameters: int = 0
    num_shards: int = 1
    node_id: str = ""
    pid: int = 0
    startup_seconds: tuple[tuple[str, float], ...] = ()  # what each stage of its start took, or of rank 0's

    @property
    def key(self) -> tuple[str, int]:
        """What tells one life of a replica from another."""
        return self.replica_id, self.epoch


@dataclass(frozen=True, slots=True)
class Membership:
    """The replicas at one version. Versions are compared for equality only: a restarted directory draws anew.

    `stopping` are the models whose replicas all go and have no successors: nothing need wait for one.
    """

    version: int
    replicas: tuple[ReplicaInfo, ...]
    stopping: frozenset[str] = frozenset()


class MembershipSource(Protocol):
    """Where a router learns of replicas."""

    async def watch(self, version: int | None) -> Membership:
        """The membership once it differs from `version` (None: at once); perhaps unchanged after a while.

        Raises DirectoryUnavailable when it cannot tell; the router asks again.
        """
        ...


class StaticMembership:
    """A membership that its owner sets; for routers that run without a directory."""

    def __init__(self, replicas: Sequence[ReplicaInfo] = ()) -> None:
        self._membership = Membership(0, tuple(replicas))
        self._changed = asyncio.Event()

    def set(self, replicas: Sequence[ReplicaInfo], stopping: frozenset[str] = frozenset()) -> None:
        self._membership = Membership(self._membership.version + 1, tuple(replicas), stopping)
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, version: int | None) -> Membership:
        while self._membership.version == version:
            await self._changed.wait()
        return self._membership
