"""Errors of the cluster: placement, connections, membership. They extend the tree of `replicas/errors.py`.

ServingError
├── DirectoryUnavailable    the directory actor does not answer; retry
├── CapacityError
│   ├── QueueFull           HTTP 429: the router's admission queue is full
│   └── NoReplica           HTTP 503: no replica took the request in time
├── EngineError
│   └── ReplicaLost         the replica of a request is gone, and its replays are used up
└── WireError               the peer broke the protocol; its connection is closed
    └── HandshakeError      the peer could not prove that it belongs to this cluster
"""

from __future__ import annotations

from ...replicas.errors import CapacityError, EngineError, ServingError


class DirectoryUnavailable(ServingError):
    """The directory actor is restarting, or Ray's control plane is unreachable."""


class QueueFull(CapacityError):
    """The router's admission queue has reached its limit of requests or tokens."""

    status = 429


class NoReplica(CapacityError):
    """No replica of the model is connected, or none had free capacity before the deadline."""

    status = 503


class ReplicaLost(EngineError):
    """The connection to a replica ended while it ran a request."""


class WireError(ServingError):
    """A frame is too large, truncated, or not a message of this protocol."""


class HandshakeError(WireError):
    """The peer has another secret or version, or is another replica than expected."""
