"""Errors of the cluster: placement, connections, membership. They extend the tree of `replicas/errors.py`.

ServingError
├── DirectoryUnavailable    the directory actor does not answer; asking again helps
├── CapacityError
│   ├── QueueFull           HTTP 429: the router's admission queue has no room
│   └── NoReplica           HTTP 503: no replica took the request in time
├── EngineError
│   └── ReplicaLost         the replica that worked on a request is gone, and the replays are used up
└── WireError               a peer broke the protocol; its connection is closed
    └── HandshakeError      the peer could not prove that it belongs to this cluster
"""

from __future__ import annotations

from ...replicas.errors import CapacityError, EngineError, ServingError


class DirectoryUnavailable(ServingError):
    """The directory actor is restarting, or Ray's control plane is away."""


class QueueFull(CapacityError):
    """The router has queued as many requests or tokens as it may."""

    status = 429


class NoReplica(CapacityError):
    """No replica of the model is connected, or none had room before the deadline."""

    status = 503


class ReplicaLost(EngineError):
    """The connection to a replica ended while it worked on a request."""


class WireError(ServingError):
    """A frame is too large, truncated, or not a message of this protocol."""


class HandshakeError(WireError):
    """The peer has another secret, another version, or is not the replica that it was taken for."""
