"""Both ends of a connection prove that they hold the cluster's secret, and that they are the two that meant to meet.

The transcript names the protocol's version, the router, the replica's id and epoch, the address that was dialled,
and a nonce of each end. Each end sends HMAC-SHA256 of its own role and the transcript. A proof is thus of no use on
another connection, for another replica, behind another address, or in the other direction. The bytes that follow
are neither encrypted nor signed: the network between the nodes is trusted with the prompts.
"""

from __future__ import annotations

import hmac
import secrets

from ...replicas.protocol import ReplicaLoad
from .errors import HandshakeError
from .frames import VERSION, Challenge, Connection, Hello, Proof, Welcome, decode, encode
from .membership import ReplicaInfo

NONCE_BYTES = 32
SECRET_BYTES = 32
_ROUTER = b"shoal router\0"
_REPLICA = b"shoal replica\0"


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def _proof(secret: bytes, role: bytes, hello: Hello, nonce: bytes) -> bytes:
    return hmac.digest(secret, role + encode(hello) + nonce, "sha256")


async def prove_as_router(connection: Connection, secret: bytes, router_id: str, info: ReplicaInfo) -> Welcome:
    """The router's side. Raises HandshakeError when the peer is not `info`'s replica, WireError when it hangs up."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    hello = Hello(VERSION, router_id, info.replica_id, info.epoch, info.host, info.port, nonce)
    connection.send(hello)
    challenge = decode(await connection.next_frame(), Challenge)
    if challenge.version != VERSION:
        raise HandshakeError(
            f"replica {info.replica_id} speaks protocol {challenge.version}, this router {VERSION}; run one version"
        )
    if not hmac.compare_digest(challenge.proof, _proof(secret, _REPLICA, hello, challenge.nonce)):
        raise HandshakeError(f"the peer at {info.host}:{info.port} is not replica {info.replica_id} of this cluster")
    connection.send(Proof(_proof(secret, _ROUTER, hello, challenge.nonce)))
    return decode(await connection.next_frame(), Welcome)


async def prove_as_replica(connection: Connection, secret: bytes, info: ReplicaInfo) -> str:
    """The replica's side, up to the router's proof; `welcome` ends it. Returns the router's id."""
    hello = decode(await connection.next_frame(), Hello)
    asked = (hello.replica_id, hello.epoch, hello.host, hello.port)
    if hello.version != VERSION or len(hello.nonce) != NONCE_BYTES:
        raise HandshakeError(f"a router speaks protocol {hello.version}, this replica {VERSION}; run one version")
    if asked != (info.replica_id, info.epoch, info.host, info.port):
        raise HandshakeError(f"a router asked for {asked}, but this is {info.replica_id} at {info.host}:{info.port}")
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.send(Challenge(VERSION, nonce, _proof(secret, _REPLICA, hello, nonce)))
    proof = decode(await connection.next_frame(), Proof)
    if not hmac.compare_digest(proof.proof, _proof(secret, _ROUTER, hello, nonce)):
        raise HandshakeError(f"router {hello.router_id!r} does not hold this cluster's secret")
    return hello.router_id


def welcome(connection: Connection, load: ReplicaLoad, draining: bool) -> None:
    connection.send(Welcome(load, draining))
