"""The handshake of a router and a replica, before their first request.

The transcript has the protocol's version, the router, the replica's id and epoch, the dialled address
and both nonces. Later frames are neither encrypted nor signed: the network between nodes must be trusted.
"""

from __future__ import annotations

from ...replicas.channel.handshake import NONCE_BYTES, Handshake, Role
from ...replicas.protocol import ReplicaLoad
from .errors import HandshakeError
from .frames import VERSION, Challenge, Connection, Hello, Proof, Welcome, decode, encode
from .membership import ReplicaInfo


async def prove_as_router(connection: Connection, secret: bytes, router_id: str, info: ReplicaInfo) -> Welcome:
    """Run the router's side. Raises HandshakeError if the peer is not `info`'s replica, WireError if it hangs up."""
    handshake = Handshake(Role.ROUTER, secret)
    hello = Hello(VERSION, router_id, info.replica_id, info.epoch, info.host, info.port, handshake.nonce)
    connection.send(hello)
    challenge = decode(await connection.next_frame(), Challenge)
    if challenge.version != VERSION:
        raise HandshakeError(
            f"replica {info.replica_id} speaks protocol {challenge.version}, this router {VERSION}; run one version"
        )
    transcript = encode(hello) + challenge.nonce
    if not handshake.peer_proved(transcript, challenge.proof):
        raise HandshakeError(f"the peer at {info.host}:{info.port} is not replica {info.replica_id} of this cluster")
    connection.send(Proof(handshake.prove(transcript)))
    return decode(await connection.next_frame(), Welcome)


async def prove_as_replica(connection: Connection, secret: bytes, info: ReplicaInfo) -> str:
    """Run the replica's side up to the router's proof; `welcome` ends it. Returns the router's id."""
    hello = decode(await connection.next_frame(), Hello)
    asked = (hello.replica_id, hello.epoch, hello.host, hello.port)
    if hello.version != VERSION or len(hello.nonce) != NONCE_BYTES:
        raise HandshakeError(f"a router speaks protocol {hello.version}, this replica {VERSION}; run one version")
    if asked != (info.replica_id, info.epoch, info.host, info.port):
        raise HandshakeError(f"a router asked for {asked}, but this is {info.replica_id} at {info.host}:{info.port}")
    handshake = Handshake(Role.REPLICA, secret)
    transcript = encode(hello) + handshake.nonce
    connection.send(Challenge(VERSION, handshake.nonce, handshake.prove(transcript)))
    proof = decode(await connection.next_frame(), Proof)
    if not handshake.peer_proved(transcript, proof.proof):
        raise HandshakeError(f"router {hello.router_id!r} does not hold this cluster's secret")
    return hello.router_id


def welcome(connection: Connection, load: ReplicaLoad, draining: bool) -> None:
    connection.send(Welcome(load, draining))
