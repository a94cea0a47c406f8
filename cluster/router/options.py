"""Options of a router; the defaults suit one machine and a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from ..wire.frames import DEFAULT_SEND_LIMIT


@dataclass(frozen=True, slots=True)
class RouterOptions:
    """Times are in seconds."""

    batching_window: float = 0.002  # arrivals within it are dispatched together
    max_queued_requests: int = 4096
    max_queued_tokens: int = 8_000_000  # about 300 MB
    queue_timeout: float = 60.0  # of a new request
    replay_limit: int = 3  # lost replicas per request
    replay_timeout: float = 30.0  # of a request whose replica was lost
    max_waiting_per_replica: int = 32  # sequences sent to a replica above its max_num_seqs
    max_pending_deltas: int = 16384  # unread ones abort the request
    prefix_index_blocks: int = 65536  # hashes per replica, about 10 MB
    connect_timeout: float = 5.0
    reconnect_delay: float = 0.1  # doubles up to max_reconnect_delay
    max_reconnect_delay: float = 2.0
    heartbeat_interval: float = 1.0
    heartbeat_timeout: float = 5.0  # without a message, the connection is cut
    send_limit: int = DEFAULT_SEND_LIMIT  # unsent bytes per replica
