"""Which replica gets a request: pure functions from what the router knows to a ranking.

A router knows every replica's load and remembers which prompts it sent where, so it ranks them all; sampling two at
random, as routers do that must ask for each load, would only lose information.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

# Weights of the score, in prompt tokens that could be computed in the time that the thing costs a new request.
# A running sequence lengthens every step a little; a waiting one has its whole prompt to go first.
TOKENS_PER_RUNNING = 16
TOKENS_PER_WAITING = 256

_DIGEST_BYTES = 16  # a collision only costs a worse placement


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica, seen by a router that wants to place a request. Loads are reports plus what was sent since."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    max_num_seqs: int
    num_cached_tokens: int = 0  # of the request's prompt, that the replica probably has in its prefix cache


@dataclass(frozen=True, slots=True)
class RequestFacts:
    num_context_tokens: int  # prompt and already emitted tokens: what must be in blocks before the first new token
    num_samples: int = 1


RoutingPolicy = Callable[[Sequence[Candidate], RequestFacts], list[int]]
"""Indices of the candidates that can take the request now, the best first; none: it waits in the router."""


def num_blocks_needed(candidate: Candidate, facts: RequestFacts) -> int:
    """Blocks that the request takes before it can decode: its uncached context, and one more for every sample."""
    uncached = facts.num_context_tokens - candidate.num_cached_tokens
    return -(-uncached // candidate.block_size) + facts.num_samples


def has_capacity(candidate: Candidate, facts: RequestFacts, max_waiting: int) -> bool:
    """Whether the request would start at once or wait behind at most `max_waiting` sequences.

    An idle replica always has room, and so has any for a request that would not fit it when idle: the engine
    refuses that one, with the reason.
    """
    num_sequences = candidate.num_running + candidate.num_waiting
    num_blocks = num_blocks_needed(candidate, facts)
    if num_sequences == 0 or num_blocks > candidate.num_blocks:
        return True
    return num_sequences < candidate.max_num_seqs + max_waiting and num_blocks <= candidate.num_free_blocks


def cost(candidate: Candidate, facts: RequestFacts) -> int:
    """What stands before the request's first token, in prompt tokens to compute: its own, the queue's, the batch's.

    A cached prefix of 512 tokens thus outweighs 2 waiting or 32 running sequences, and no more: a popular prefix
    spreads to other replicas as soon as waiting for it costs more than computing it again.
    """
    uncached = facts.num_context_tokens - candidate.num_cached_tokens
    return uncached + TOKENS_PER_WAITING * candidate.num_waiting + TOKENS_PER_RUNNING * candidate.num_running


def least_cost(max_waiting: int) -> RoutingPolicy:
    """The default policy: those with room by `cost`, ties to the one with more free blocks."""

    def rank(candidates: Sequence[Candidate], facts: RequestFacts) -> list[int]:
        able = [i for i, candidate in enumerate(candidates) if has_capacity(candidate, facts, max_waiting)]
        return sorted(able, key=lambda i: (cost(candidates[i], facts), -candidates[i].num_free_blocks))

    return rank


def chain_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """One hash for every full block of `token_ids`, each over all tokens before it and the salt."""
    data = array("I", token_ids).tobytes()
    stride = block_size * array("I").itemsize
    digest = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    hashes = []
    for end in range(stride, len(data) + 1, stride):
        digest = blake2b(data[end - stride : end], digest_size=_DIGEST_BYTES, key=digest).digest()
        hashes.append(digest)
    return hashes


class PrefixIndex:
    """The chained hashes of prompts that were sent to one replica; the least recently sent are forgotten first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def add(self, hashes: Sequence[bytes]) -> None:
        # From the end, so that a chain's beginning, without which the rest is of no use, is the last to be forgotten.
        for digest in reversed(hashes):
            self._hashes[digest] = None
            self._hashes.move_to_end(digest)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)

    def num_blocks(self, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of the chain are known."""
        for i, digest in enumerate(hashes):
            if digest not in self._hashes:
                return i
        return len(hashes)

    def clear(self) -> None:
        self._hashes.clear()
