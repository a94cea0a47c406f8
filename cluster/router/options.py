"""How a router behaves; every field has a default that suits one machine as well as a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from ..wire.frames import DEFAULT_SEND_LIMIT


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """Times are in seconds."""

    batching_window: float = 0.002  # arrivals within it are dispatched together; the first of a quiet router at once
    max_queued_requests: int = 4096
    max_queued_tokens: int = 8_000_000  # context tokens of the queued requests: some 300 MB
    queue_timeout: float = 60.0  # for a replica to have room for a new request; then CapacityError
    replay_limit: int = 3  # replicas that one request may lose
    replay_timeout: float = 30.0  # for a replica to have room for a request that lost its own; then an error delta
    max_waiting_per_replica: int = 32  # sequences sent to a replica beyond those that it runs at once
    max_pending_deltas: int = 16384  # that the reader of one request may leave unread before the request is aborted
    prefix_index_blocks: int = 65536  # hashes remembered per replica, some 10 MB
    connect_timeout: float = 5.0
    reconnect_delay: float = 0.1  # doubles up to max_reconnect_delay
    max_reconnect_delay: float = 2.0
    heartbeat_interval: float = 1.0
    heartbeat_timeout: float = 5.0  # without a word from a replica, its connection is cut
    send_limit: int = DEFAULT_SEND_LIMIT  # bytes that may wait for one replica
