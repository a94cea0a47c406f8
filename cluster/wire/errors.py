"""Errors of the cluster, in the tree of `replicas/errors.py`.

ServingError
├── DirectoryUnavailable
├── CapacityError
│   ├── QueueFull           HTTP 429
│   └── NoReplica           HTTP 503
├── EngineError
│   └── ReplicaLost
└── WireError
    └── HandshakeError
"""

from __future__ import annotations

from ...replicas.errors import CapacityError, EngineError, ServingError


class DirectoryUnavailable(ServingError):
    """The directory actor does not answer; retry."""


class QueueFull(CapacityError):
    """The router's admission queue is full."""

    status = 429


class NoReplica(CapacityError):
    """No replica had free capacity before the deadline."""

    status = 503


class ReplicaLost(EngineError):
    """The replica of a request is gone, and its replays are used up."""


class WireError(ServingError):
    """A peer broke the protocol; its connection is closed."""


class HandshakeError(WireError):
    """The peer has another secret or version, or is another replica than expected."""
