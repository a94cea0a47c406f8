"""The replica registry ("membership"): addresses and constant facts of all replicas.

Replicas report their loads over their connections.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReplicaInfo:
    """A replica's address and the constant facts of its engine.

    epoch: random per start.
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
    startup_seconds: tuple[tuple[str, float], ...] = ()  # by stage; rank 0's for a group

    @property
    def key(self) -> tuple[str, int]:
        """Identifies one life of a replica."""
        return self.replica_id, self.epoch


@dataclass(frozen=True, slots=True)
class Membership:
    """All replicas at one version. Versions have no order. stopping: models whose replicas get no successor."""

    version: int
    replicas: tuple[ReplicaInfo, ...]
    stopping: frozenset[str] = frozenset()


class MembershipSource(Protocol):
    """Service discovery: reports the replicas to a router."""

    async def watch(self, version: int | None) -> Membership:
        """The membership when it differs from `version` (None: at once), or unchanged after a timeout.

        Raises DirectoryUnavailable; the router retries.
        """
        ...


class StaticMembership:
    """A membership set by the program, for routers without a directory."""

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
