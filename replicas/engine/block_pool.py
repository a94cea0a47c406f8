"""KV blocks: who holds them, which can be reused, which can be given away.

Every block is in exactly one of three states:

- *free*: no sequence holds it and nothing is known of its content; kept on a stack, so that many are taken or
  returned by one slice;
- *cached*: no sequence holds it, but its content is known by a hash and may be wanted again; kept in the order in
  which it will be evicted;
- *used*: one or more sequences hold it. It may be known by a hash too.

Eviction takes the block that was released longest ago. A sequence releases the tail of its table first, so that a
block is evicted before the one it continues: a prefix stays reachable as long as anything of it is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..plan import Ints
from ..protocol import BlockReport

DIGEST_BYTES = 32  # 256 bits: equal digests mean equal prefixes, also against a tenant who searches for a collision


def extend_digests(digests: list[bytes], token_ids: Ints, block_size: int, salt: str) -> None:
    """Append to `digests` those of the full blocks of `token_ids` that it lacks.

    A block's digest covers its tokens and the digest of the block before it, so it names the whole prefix up to its
    end. The first one continues from the salt: prefixes of different salts never meet.
    """
    num_full = len(token_ids) // block_size
    if num_full <= len(digests):
        return
    parent = (
        digests[-1] if digests else blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
    )
    content = np.ascontiguousarray(token_ids, np.int32).tobytes()
    stride = block_size * np.dtype(np.int32).itemsize
    for begin in range(len(digests) * stride, num_full * stride, stride):
        digest = blake2b(parent, digest_size=DIGEST_BYTES)
        digest.update(content[begin : begin + stride])
        parent = digest.digest()
        digests.append(parent)


class BlockPool:
    """Reference counts, prefix cache and free list of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts: NDArray[np.int32] = np.zeros(num_blocks, np.int32)  # sequences that hold each block
        self.num_copied = 0  # copy-on-write copies since start
        self._stack = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._stack_size = num_blocks
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted comes first
        self._hashed = np.zeros(num_blocks, bool)
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free and cached."""
        return self._stack_size + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that keep a reusable prefix."""
        return len(self._cached)

    def allocate(self, count: int) -> Ints:
        """Take `count` blocks, each with one holder, evicting cached ones only when the free ones are gone.

        The caller has looked at `num_free` before.
        """
        assert count <= self.num_free, f"{count} blocks wanted of {self.num_free}"
        if count > self._stack_size:
            self._evict(count - self._stack_size)
        self._stack_size -= count
        blocks = self._stack[self._stack_size : self._stack_size + count].copy()
        self.ref_counts[blocks] = 1
        return blocks

    def share(self, blocks: Ints, num_holders: int = 1) -> None:
        """Add holders to distinct blocks that somebody holds already."""
        self.ref_counts[blocks] += num_holders

    def release(self, blocks: Ints) -> None:
        """Give up one hold on each of one sequence's blocks, which are distinct and in the order of its table."""
        counts = self.ref_counts[blocks] - 1
        assert counts.size == 0 or counts.min() >= 0, "a block was released more often than it was held"
        self.ref_counts[blocks] = counts
        idle = blocks[counts == 0]
        hashed = self._hashed[idle]
        self._push(idle[~hashed])
        for block in idle[hashed][::-1].tolist():
            self._cached[block] = None

    def lookup(self, digests: Sequence[bytes]) -> Ints:
        """The blocks that hold the longest known prefix of the chain. Nothing is taken yet; see `acquire`."""
        blocks: list[int] = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            blocks.append(block)
        return np.array(blocks, np.int32)

    def num_copies(self, blocks: Ints) -> int:
        """Copies that must be made if the holder of each of `blocks`, some named more than once, is to write it.

        The last of all holders of a block writes in place.
        """
        distinct, num_writers = np.unique(blocks, return_counts=True)
        return len(blocks) - int(np.count_nonzero(self.ref_counts[distinct] == num_writers))

    def num_idle(self, blocks: Ints) -> int:
        """How many of `blocks` nobody holds: acquiring them takes as many from `num_free`."""
        return int(np.count_nonzero(self.ref_counts[blocks] == 0))

    def acquire(self, blocks: Ints) -> None:
        """Hold blocks that `lookup` found."""
        for block in blocks[self.ref_counts[blocks] == 0].tolist():
            del self._cached[block]
        self.ref_counts[blocks] += 1

    def register(self, blocks: Ints, digests: Sequence[bytes]) -> None:
        """Make held blocks known by their digests. Of two blocks of equal content the first one stays known."""
        for block, digest in zip(blocks.tolist(), digests, strict=True):
            if digest not in self._block_of and not self._hashed[block]:
                self._block_of[digest] = block
                self._digest_of[block] = digest
                self._hashed[block] = True

    def forget(self, digests: Sequence[bytes]) -> None:
        """Make the blocks of these digests unknown, held or cached, so that nobody reuses what they hold."""
        for digest in digests:
            block = self._block_of.pop(digest, None)
            if block is None:
                continue
            del self._digest_of[block]
            self._hashed[block] = False
            if not self.ref_counts[block]:
                del self._cached[block]
                self._push(np.array([block], np.int32))

    def reset_prefix_cache(self) -> bool:
        """Forget every hash. Refused (False, nothing changed) while a sequence holds a block."""
        if self.num_free != self.num_blocks:
            return False
        self._evict(len(self._cached))
        return True

    def report(self) -> BlockReport:
        """How all of the blocks in use are held."""
        return BlockReport(
            shared=int(np.count_nonzero(self.ref_counts > 1)),
            private=int(np.count_nonzero(self.ref_counts == 1)),
            copied=self.num_copied,
        )

    def check(self, tables: Iterable[Ints]) -> None:
        """Prove that free + cached + used = all, and that the holders are exactly `tables` (one per sequence)."""
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
        assert {block: digest for digest, block in self._block_of.items()} == self._digest_of
        assert sorted(self._digest_of) == np.flatnonzero(self._hashed).tolist()

    def _evict(self, count: int) -> None:
        evicted = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for block in evicted:
            del self._block_of[self._digest_of.pop(block)]
        blocks = np.array(evicted, np.int32)
        self._hashed[blocks] = False
        self._push(blocks)

    def _push(self, blocks: Ints) -> None:
        self._stack[self._stack_size : self._stack_size + len(blocks)] = blocks
        self._stack_size += len(blocks)
