"""How a shard and its engine prove to each other that they hold the group's token, before the first frame.

    engine                             shard
    Challenge(nonce)             ->
                                 <-    Hello(rank, world size, nonce, proof)
    Answer(status, proof | why)  ->

A proof is HMAC-SHA256, by the token, of the role and of everything said before it; the token itself is never sent.
What follows is neither encrypted nor signed: the network between the nodes is trusted with the tokens of a step.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
from typing import NamedTuple

from ..errors import EngineError
from .step_frames import MAGIC, VERSION

_NONCE_BYTES = 32
_PROOF_BYTES = 32
_MAX_REASON_BYTES = 1024
_CHALLENGE = struct.Struct(f"<4sH2x{_NONCE_BYTES}s")
_HELLO = struct.Struct(f"<4sH2xii{_NONCE_BYTES}s{_PROOF_BYTES}s")
_ANSWER = struct.Struct(f"<4sHHI{_PROOF_BYTES}s")
HELLO_BYTES = _HELLO.size
_ENGINE, _SHARD = b"shoal engine\0", b"shoal shard\0"
_WELCOME, _REFUSED = 0, 1
_NO_PROOF = bytes(_PROOF_BYTES)


class ChannelRefused(EngineError):
    """The two ends do not belong together: another token, version or world size, or a rank that is taken."""


class Greeting(NamedTuple):
    """A shard that has proved itself, and what it is to be answered."""

    rank: int
    welcome: bytes


def new_nonce() -> bytes:
    return secrets.token_bytes(_NONCE_BYTES)


def challenge(nonce: bytes) -> bytes:
    return _CHALLENGE.pack(MAGIC, VERSION, nonce)


def verify(hello: bytes | bytearray, nonce: bytes, token: bytes, world_size: int) -> Greeting:
    """The engine's check of a shard's hello. Raises ChannelRefused."""
    magic, version, rank, shard_world_size, shard_nonce, proof = _HELLO.unpack(hello)
    _check_protocol(magic, version, "a shard")
    said = _transcript(rank, shard_world_size, nonce, shard_nonce)
    if not hmac.compare_digest(proof, hmac.digest(token, _SHARD + said, "sha256")):
        raise ChannelRefused(f"the shard that says it is rank {rank} does not hold this group's token")
    if shard_world_size != world_size:
        raise ChannelRefused(f"rank {rank} expects {shard_world_size} ranks, the engine has {world_size}")
    if not 0 <= rank < world_size:
        raise ChannelRefused(f"rank {rank} is not one of the {world_size} ranks 0 to {world_size - 1}")
    proof = hmac.digest(token, _ENGINE + said, "sha256")
    return Greeting(rank, _ANSWER.pack(MAGIC, VERSION, _WELCOME, 0, proof))


def refusal(reason: str) -> bytes:
    data = reason.encode()[:_MAX_REASON_BYTES]
    return _ANSWER.pack(MAGIC, VERSION, _REFUSED, len(data), _NO_PROOF) + data


def introduce(sock: socket.socket, rank: int, world_size: int, token: bytes) -> None:
    """The shard's side, on a socket with a timeout. Raises ChannelRefused, or OSError where the connection ends."""
    magic, version, nonce = _CHALLENGE.unpack(_receive(sock, _CHALLENGE.size))
    _check_protocol(magic, version, "the engine")
    shard_nonce = new_nonce()
    said = _transcript(rank, world_size, nonce, shard_nonce)
    proof = hmac.digest(token, _SHARD + said, "sha256")
    sock.sendall(_HELLO.pack(MAGIC, VERSION, rank, world_size, shard_nonce, proof))
    magic, version, status, length, proof = _ANSWER.unpack(_receive(sock, _ANSWER.size))
    _check_protocol(magic, version, "the engine")
    if status != _WELCOME:
        reason = _receive(sock, min(length, _MAX_REASON_BYTES)).decode(errors="replace")
        raise ChannelRefused(f"the engine refuses rank {rank}: {reason}")
    if not hmac.compare_digest(proof, hmac.digest(token, _ENGINE + said, "sha256")):
        raise ChannelRefused(f"the peer that welcomes rank {rank} does not hold this group's token")


def _transcript(rank: int, world_size: int, engine_nonce: bytes, shard_nonce: bytes) -> bytes:
    return struct.pack("<Hii", VERSION, rank, world_size) + engine_nonce + shard_nonce


def _check_protocol(magic: bytes, version: int, who: str) -> None:
    if magic != MAGIC:
        raise ChannelRefused(f"{who} begins with {magic!r}, not with {MAGIC!r}: it speaks another protocol")
    if version != VERSION:
        raise ChannelRefused(f"{who} speaks version {version} of steps, this process {VERSION}; run one version")


def _receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    view, begin = memoryview(data), 0
    while begin < num_bytes:
        count = sock.recv_into(view[begin:])
        if not count:
            raise ConnectionError(f"the peer hung up after {begin} of {num_bytes} bytes of the handshake")
        begin += count
    return bytes(data)
