"""The handshake of a shard and its engine, before the first frame.

    engine                             shard
    Challenge(nonce)             ->
                                 <-    Hello(rank, world size, nonce, proof)
    Answer(status, proof | why)  ->

The group's token is the secret of `handshake.py`. Later frames rely on a trusted network.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from ..errors import EngineError
from .handshake import NONCE_BYTES, PROOF_BYTES, Handshake, Role
from .step_frames import MAGIC, VERSION

_MAX_REASON_BYTES = 1024
_CHALLENGE = struct.Struct(f"<4sH2x{NONCE_BYTES}s")
_HELLO = struct.Struct(f"<4sH2xii{NONCE_BYTES}s{PROOF_BYTES}s")
_ANSWER = struct.Struct(f"<4sHHI{PROOF_BYTES}s")
HELLO_BYTES = _HELLO.size
_WELCOME, _REFUSED = 0, 1
_NO_PROOF = bytes(PROOF_BYTES)


class ChannelRefused(EngineError):
    """The two ends differ in token, version or world size, or the rank is connected already."""


class Greeting(NamedTuple):
    """A shard that proved itself, and the answer to it."""

    rank: int
    welcome: bytes


def challenge(nonce: bytes) -> bytes:
    return _CHALLENGE.pack(MAGIC, VERSION, nonce)


def verify(hello: bytes | bytearray, handshake: Handshake, world_size: int) -> Greeting:
    """The engine's check of a shard's hello. Raises ChannelRefused."""
    magic, version, rank, shard_world_size, shard_nonce, proof = _HELLO.unpack(hello)
    _check_protocol(magic, version, "a shard")
    transcript = _transcript(rank, shard_world_size, handshake.nonce, shard_nonce)
    if not handshake.peer_proved(transcript, proof):
        raise ChannelRefused(f"the shard that claims to be rank {rank} does not hold this group's token")
    if shard_world_size != world_size:
        raise ChannelRefused(f"rank {rank} expects {shard_world_size} ranks, the engine has {world_size}")
    if not 0 <= rank < world_size:
        raise ChannelRefused(f"rank {rank} is not one of the {world_size} ranks 0 to {world_size - 1}")
    return Greeting(rank, _ANSWER.pack(MAGIC, VERSION, _WELCOME, 0, handshake.prove(transcript)))


def refusal(reason: str) -> bytes:
    data = reason.encode()[:_MAX_REASON_BYTES]
    return _ANSWER.pack(MAGIC, VERSION, _REFUSED, len(data), _NO_PROOF) + data


def introduce(sock: socket.socket, rank: int, world_size: int, token: bytes) -> None:
    """Run the shard's side on a socket with a timeout. Raises ChannelRefused or OSError."""
    handshake = Handshake(Role.SHARD, token)
    magic, version, engine_nonce = _CHALLENGE.unpack(_receive(sock, _CHALLENGE.size))
    _check_protocol(magic, version, "the engine")
    transcript = _transcript(rank, world_size, engine_nonce, handshake.nonce)
    proof = handshake.prove(transcript)
    sock.sendall(_HELLO.pack(MAGIC, VERSION, rank, world_size, handshake.nonce, proof))
    magic, version, status, length, proof = _ANSWER.unpack(_receive(sock, _ANSWER.size))
    _check_protocol(magic, version, "the engine")
    if status != _WELCOME:
        reason = _receive(sock, min(length, _MAX_REASON_BYTES)).decode(errors="replace")
        raise ChannelRefused(f"the engine refuses rank {rank}: {reason}")
    if not handshake.peer_proved(transcript, proof):
        raise ChannelRefused(f"the peer that welcomes rank {rank} does not hold this group's token")


def _transcript(rank: int, world_size: int, engine_nonce: bytes, shard_nonce: bytes) -> bytes:
    return struct.pack("<Hii", VERSION, rank, world_size) + engine_nonce + shard_nonce


def _check_protocol(magic: bytes, version: int, peer: str) -> None:
    if magic != MAGIC:
        raise ChannelRefused(f"{peer} begins with {magic!r}, not with {MAGIC!r}: it speaks another protocol")
    if version != VERSION:
        raise ChannelRefused(f"{peer} speaks version {version} of steps, this process {VERSION}; run one version")


def _receive(sock: socket.socket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    view, begin = memoryview(data), 0
    while begin < num_bytes:
        count = sock.recv_into(view[begin:])
        if not count:
            raise ConnectionError(f"the peer hung up after {begin} of {num_bytes} bytes of the handshake")
        begin += count
    return bytes(data)
