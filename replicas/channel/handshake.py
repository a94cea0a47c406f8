"""Mutual proof by HMAC-SHA256 that both ends of a connection hold one secret.

A proof covers its sender's role and the transcript, with a fresh nonce of each end. It is refused
on another connection, direction or wire. Later bytes are neither encrypted nor signed.
"""

from __future__ import annotations

import hmac
import secrets
from enum import Enum, unique

NONCE_BYTES = 32
PROOF_BYTES = 32
SECRET_BYTES = 32


@unique
class Role(Enum):
    """The ends of both wires. No label is a prefix of another, so no two roles share a proof."""

    ROUTER = b"shoal router\0"
    REPLICA = b"shoal replica\0"
    ENGINE = b"shoal engine\0"
    SHARD = b"shoal shard\0"


_PEERS = {
    Role.ROUTER: Role.REPLICA,
    Role.REPLICA: Role.ROUTER,
    Role.ENGINE: Role.SHARD,
    Role.SHARD: Role.ENGINE,
}


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


class Handshake:
    """One end of one connection."""

    __slots__ = ("_role", "_secret", "nonce")

    def __init__(self, role: Role, secret: bytes) -> None:
        self._role = role
        self._secret = secret
        self.nonce = secrets.token_bytes(NONCE_BYTES)

    def prove(self, transcript: bytes) -> bytes:
        """This end's proof, PROOF_BYTES long."""
        return self._proof(self._role, transcript)

    def peer_proved(self, transcript: bytes, proof: bytes) -> bool:
        """Whether `proof` is the peer's over `transcript`, in constant time."""
        return hmac.compare_digest(proof, self._proof(_PEERS[self._role], transcript))

    def _proof(self, role: Role, transcript: bytes) -> bytes:
        return hmac.digest(self._secret, role.value + transcript, "sha256")
