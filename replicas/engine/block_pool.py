"""KV blocks: reference counts, the prefix cache, and eviction.

Every block is in exactly one of three states:

- *free*: no holder, no hash; on a stack, so that a slice takes many;
- *cached*: no holder, but a hash, by which it may be reused; in the order of eviction;
- *used*: one or more sequences hold it. It may have a hash too.

Eviction takes the block released longest ago. A sequence releases the tail of its table first, so the head of a
prefix stays reachable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..plan import Ints
from ..protocol import BlockReport

HASH_BYTES = 32  # 256 bits: equal hashes mean equal prefixes, even if a tenant searches for a collision


def extend_hashes(hashes: list[bytes], token_ids: Ints, block_size: int, salt: str) -> None:
    """Append the missing hashes of the full blocks of `token_ids` to `hashes`.

    A hash covers its block's tokens and the hash before it (first: the salt), so it identifies
    the whole prefix.
    """
    num_full = len(token_ids) // block_size
    if num_full <= len(hashes):
        return
    parent = hashes[-1] if hashes else blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
    content = np.ascontiguousarray(token_ids, np.int32).tobytes()
    stride = block_size * np.dtype(np.int32).itemsize
    for begin in range(len(hashes) * stride, num_full * stride, stride):
        block_hash = blake2b(parent, digest_size=HASH_BYTES)
        block_hash.update(content[begin : begin + stride])
        parent = block_hash.digest()
        hashes.append(parent)


class BlockPool:
    """Reference counts, prefix cache and free list of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts: NDArray[np.int32] = np.zeros(num_blocks, np.int32)  # holders of each block
        self.num_copied = 0  # copies on write
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._stack_size = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # in the order of eviction
        self._hashed = np.zeros(num_blocks, bool)
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can return."""
        return self._stack_size + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without a holder that keep a prefix."""
        return len(self._cached)

    def allocate(self, count: int) -> Ints:
        """Take `count` blocks, evicting cached ones if needed. The caller checks `num_free`."""
        assert count <= self.num_free, f"{count} blocks wanted of {self.num_free}"
        if count > self._stack_size:
            self._evict(count - self._stack_size)
        self._stack_size -= count
        blocks = self._stack[self._stack_size : self._stack_size + count].copy()
        self.ref_counts[blocks] = 1
        return blocks

    def share(self, blocks: Ints, num_holders: int = 1) -> None:
        """Add holders to distinct blocks in use."""
        self.ref_counts[blocks] += num_holders

    def release(self, blocks: Ints) -> None:
        """Drop one holder of each block, distinct and in table order."""
        counts = self.ref_counts[blocks] - 1
        assert counts.size == 0 or counts.min() >= 0, "a block was released more often than it was held"
        self.ref_counts[blocks] = counts
        idle = blocks[counts == 0]
        hashed = self._hashed[idle]
        self._push(idle[~hashed])
        for block in idle[hashed][::-1].tolist():
            self._cached[block] = None

    def lookup(self, hashes: Sequence[bytes]) -> Ints:
        """The longest cached prefix of the chain. `acquire` takes it."""
        blocks: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return np.array(blocks, np.int32)

    def num_copies(self, blocks: Ints) -> int:
        """Copies needed to write `blocks`, which may repeat; a block's last holder writes in place."""
        distinct, num_writers = np.unique(blocks, return_counts=True)
        return len(blocks) - int(np.count_nonzero(self.ref_counts[distinct] == num_writers))

    def num_idle(self, blocks: Ints) -> int:
        """How many of `blocks` have no holder."""
        return int(np.count_nonzero(self.ref_counts[blocks] == 0))

    def acquire(self, blocks: Ints) -> None:
        """Add a holder to blocks that `lookup` found."""
        for block in blocks[self.ref_counts[blocks] == 0].tolist():
            del self._cached[block]
        self.ref_counts[blocks] += 1

    def register(self, blocks: Ints, hashes: Sequence[bytes]) -> None:
        """Add used blocks to the prefix cache. Of equal blocks the first stays."""
        for block, block_hash in zip(blocks.tolist(), hashes, strict=True):
            if block_hash not in self._block_of and not self._hashed[block]:
                self._block_of[block_hash] = block
                self._hash_of[block] = block_hash
                self._hashed[block] = True

    def forget(self, hashes: Sequence[bytes]) -> None:
        """Remove these hashes from the prefix cache."""
        for block_hash in hashes:
            block = self._block_of.pop(block_hash, None)
            if block is None:
                continue
            del self._hash_of[block]
            self._hashed[block] = False
            if not self.ref_counts[block]:
                del self._cached[block]
                self._push(np.array([block], np.int32))

    def reset_prefix_cache(self) -> bool:
        """Forget every hash. Refused (False) while a sequence holds a block."""
        if self.num_free != self.num_blocks:
            return False
        self._evict(len(self._cached))
        return True

    def report(self) -> BlockReport:
        """Shared, private and copied blocks."""
        return BlockReport(
            shared=int(np.count_nonzero(self.ref_counts > 1)),
            private=int(np.count_nonzero(self.ref_counts == 1)),
            copied=self.num_copied,
        )

    def check(self, tables: Iterable[Ints]) -> None:
        """Assert that free + cached + used = all, and that the holders are exactly `tables`."""
        holders = np.zeros(self.num_blocks, np.int32)
        for table in tables:
            assert len(np.unique(table)) == len(table), f"a block stands twice in one table: {table}"
            holders[table] += 1
        wrong = np.flatnonzero(holders != self.ref_counts)
        assert wrong.size == 0, f"blocks {wrong}: held by {holders[wrong]}, counted {self.ref_counts[wrong]}"
        free = self._stack[: self._stack_size].tolist()
        used = np.flatnonzero(self.ref_counts).tolist()
        everything = sorted([*free, *self._cached, *used])
        assert everything == list(range(self.num_blocks)), "free + cached + used is not every block once"
        assert not self._hashed[free].any(), "a free block has a hash"
        assert all(self._hashed[block] for block in self._cached), "a cached block has no hash"
        assert {block: block_hash for block_hash, block in self._block_of.items()} == self._hash_of
        assert sorted(self._hash_of) == np.flatnonzero(self._hashed).tolist()

    def _evict(self, count: int) -> None:
        evicted = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for block in evicted:
            del self._block_of[self._hash_of.pop(block)]
        blocks = np.array(evicted, np.int32)
        self._hashed[blocks] = False
        self._push(blocks)

    def _push(self, blocks: Ints) -> None:
        self._stack[self._stack_size : self._stack_size + len(blocks)] = blocks
        self._stack_size += len(blocks)
