"""Routing policies: pure functions that rank the replicas for a request.

The router knows every load, so it ranks all replicas instead of sampling two.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

# Weights of the cost in prompt tokens: a running sequence lengthens each step, a waiting one runs its prompt first.
TOKENS_PER_RUNNING = 16
TOKENS_PER_WAITING = 256

_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica's last reported load, plus the requests sent since."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    block_size: int
    max_num_seqs: int
    num_cached_tokens: int = 0  # of this prompt


@dataclass(frozen=True, slots=True)
class RequestFacts:
    num_context_tokens: int  # prompt and emitted tokens
    num_samples: int = 1


RoutingPolicy = Callable[[Sequence[Candidate], RequestFacts], list[int]]
"""Indices of the candidates with capacity, best first. If empty, the request waits."""


def num_blocks_needed(candidate: Candidate, facts: RequestFacts) -> int:
    """Blocks needed before the first decode: the uncached context, plus one per sample."""
    uncached = facts.num_context_tokens - candidate.num_cached_tokens
    return -(-uncached // candidate.block_size) + facts.num_samples


def has_capacity(candidate: Candidate, facts: RequestFacts, max_waiting: int) -> bool:
    """Whether the request would start at once or wait behind at most `max_waiting` sequences.

    True for an idle replica, and for a request above the whole cache, which the engine refuses.
    """
    num_sequences = candidate.num_running + candidate.num_waiting
    num_blocks = num_blocks_needed(candidate, facts)
    if num_sequences == 0 or num_blocks > candidate.num_blocks:
        return True
    return num_sequences < candidate.max_num_seqs + max_waiting and num_blocks <= candidate.num_free_blocks


def cost(candidate: Candidate, facts: RequestFacts) -> int:
    """The work before the request's first token, in prompt tokens: its own, the queue's and the batch's.

    A cached prefix of 512 tokens equals 2 waiting or 32 running sequences, so a popular prefix spreads.
    """
    uncached = facts.num_context_tokens - candidate.num_cached_tokens
    return uncached + TOKENS_PER_WAITING * candidate.num_waiting + TOKENS_PER_RUNNING * candidate.num_running


def least_cost(max_waiting: int) -> RoutingPolicy:
    """The default policy: lowest `cost`, then most free blocks."""

    def rank(candidates: Sequence[Candidate], facts: RequestFacts) -> list[int]:
        able = [i for i, candidate in enumerate(candidates) if has_capacity(candidate, facts, max_waiting)]
        return sorted(able, key=lambda i: (cost(candidates[i], facts), -candidates[i].num_free_blocks))

    return rank


def chain_hashes(token_ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """One hash per full block, over the salt and all tokens up to its end."""
    data = array("I", token_ids).tobytes()
    stride = block_size * array("I").itemsize
    digest = blake2b(salt.encode(), digest_size=_DIGEST_BYTES).digest()
    hashes: list[bytes] = []
    for end in range(stride, len(data) + 1, stride):
        digest = blake2b(data[end - stride : end], digest_size=_DIGEST_BYTES, key=digest).digest()
        hashes.append(digest)
    return hashes


class PrefixIndex:
    """Chained hashes of the prompts sent to one replica, evicted in LRU order."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()

    def add(self, hashes: Sequence[bytes]) -> None:
        # In reverse: the rest of a chain is useless without its start, which is evicted last.
        for digest in reversed(hashes):
            self._hashes[digest] = None
            self._hashes.move_to_end(digest)
        while len(self._hashes) > self._capacity:
            self._hashes.popitem(last=False)

    def num_blocks(self, hashes: Sequence[bytes]) -> int:
        """Number of known leading blocks."""
        for i, digest in enumerate(hashes):
            if digest not in self._hashes:
                return i
        return len(hashes)

    def clear(self) -> None:
        self._hashes.clear()
