"""The block pool: conservation of blocks, reuse by content, order of eviction."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.replicas.engine.block_pool import HASH_BYTES, BlockPool, extend_hashes
from shoal.replicas.protocol import BlockReport


def digests_of(tokens: list[int], block_size: int = 2, salt: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, np.array(tokens, np.int32), block_size, salt)
    return hashes


def cached_chain(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Fill blocks with `tokens`, register and release them; their ids, first of the chain first."""
    hashes = digests_of(tokens, pool.block_size)
    blocks = pool.allocate(len(hashes))
    pool.register(blocks, hashes)
    pool.release(blocks)
    return blocks.tolist()


def test_digests_name_whole_prefixes():
    first, second = digests_of([1, 2, 3, 4, 5])
    assert len(first) == HASH_BYTES == 32
    assert digests_of([1, 2, 3, 4]) == [first, second]
    assert digests_of([9, 2, 3, 4])[1] != second  # same block, other prefix
    assert set(digests_of([1, 2, 3, 4], salt="tenant")).isdisjoint({first, second})


def test_digests_grow_as_tokens_do():
    hashes = digests_of([1, 2, 3])
    extend_hashes(hashes, np.array([1, 2, 3, 4, 5, 6], np.int32), 2, "")
    assert hashes == digests_of([1, 2, 3, 4, 5, 6])


def test_a_salt_may_hold_lone_surrogates():
    assert digests_of([1, 2], salt="\ud800") != digests_of([1, 2], salt="\ud801")


def test_lookup_stops_at_the_first_unknown_block():
    pool = BlockPool(8, 2)
    blocks = cached_chain(pool, [1, 2, 3, 4, 5, 6])
    assert pool.lookup(digests_of([1, 2, 3, 4, 0, 0])).tolist() == blocks[:2]
    assert pool.lookup(digests_of([0, 0, 3, 4])).tolist() == []


def test_acquired_blocks_are_not_evicted_and_return_to_the_cache():
    pool = BlockPool(4, 2)
    blocks = cached_chain(pool, [1, 2, 3, 4])
    found = pool.lookup(digests_of([1, 2, 3, 4]))
    assert pool.num_idle(found) == 2
    pool.acquire(found)
    pool.acquire(found)
    others = pool.allocate(2)
    assert pool.num_free == 0
    assert set(others.tolist()).isdisjoint(blocks)
    pool.release(found)
    assert pool.num_cached == 0
    pool.release(found)
    assert pool.num_cached == 2
    pool.check([others])


def test_free_blocks_go_before_cached_ones_and_tails_before_parents():
    pool = BlockPool(4, 2)
    older = cached_chain(pool, [1, 2, 3, 4])
    newer = cached_chain(pool, [5, 6])
    assert set(pool.allocate(1).tolist()).isdisjoint(older + newer)
    assert pool.allocate(1).tolist() == [older[1]]
    assert pool.lookup(digests_of([1, 2, 3, 4])).tolist() == [older[0]]
    assert pool.allocate(1).tolist() == [older[0]]
    assert pool.lookup(digests_of([5, 6])).tolist() == newer


def test_of_equal_blocks_the_first_one_is_known():
    pool = BlockPool(4, 2)
    hashes = digests_of([1, 2])
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first, hashes)
    pool.register(second, hashes)
    pool.release(first)
    pool.release(second)
    assert pool.lookup(hashes).tolist() == first.tolist()
    assert pool.num_cached == 1
    pool.check([])


def test_reset_is_refused_while_a_block_is_held():
    pool = BlockPool(4, 2)
    cached_chain(pool, [1, 2])
    held = pool.allocate(1)
    assert not pool.reset_prefix_cache()
    assert pool.num_cached == 1
    pool.release(held)
    assert pool.reset_prefix_cache()
    assert pool.num_cached == 0
    assert pool.lookup(digests_of([1, 2])).size == 0
    pool.check([])


def test_report_counts_blocks_by_their_holders():
    pool = BlockPool(8, 2)
    blocks = pool.allocate(3)
    pool.share(blocks[:2], 4)
    assert pool.report() == BlockReport(shared=2, private=1, copied=0)


def test_the_last_holder_of_a_block_needs_no_copy():
    pool = BlockPool(4, 2)
    first, second, third = (int(block) for block in pool.allocate(3))
    pool.share(np.array([first, second], np.int32), 2)  # three holders each
    assert pool.num_copies(np.array([first] * 3, np.int32)) == 2
    assert pool.num_copies(np.array([first] * 3 + [second] * 2 + [third], np.int32)) == 4
    assert pool.num_copies(np.array([], np.int32)) == 0


def test_releasing_twice_is_caught():
    pool = BlockPool(4, 2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


class PoolMachine(RuleBasedStateMachine):
    """Random holders of random chains; `check` recounts everything from their tables after each rule."""

    num_blocks = 9
    block_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.num_blocks, self.block_size)
        self.tables: list[np.ndarray] = []
        self.content: dict[int, tuple[int, ...]] = {}  # whole prefix that each block was registered for

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=12))
    def start(self, tokens: list[int]) -> None:
        hashes = digests_of(tokens)
        found = self.pool.lookup(hashes)
        for i, block in enumerate(found.tolist()):
            assert self.content[block] == tuple(tokens[: 2 * i + 2]), "a hit holds other tokens"
        count = len(hashes) - len(found)
        if self.pool.num_free - self.pool.num_idle(found) < count:
            return
        self.pool.acquire(found)
        table = np.concatenate([found, self.pool.allocate(count)])
        for i, block in enumerate(table.tolist()):
            self.content[block] = tuple(tokens[: 2 * i + 2])
        self.pool.register(table, hashes)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), count=st.integers(1, 3))
    def fork(self, data: st.DataObject, count: int) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.pool.share(table, count)
        self.tables += [table.copy() for _ in range(count)]

    @precondition(lambda self: self.tables and self.pool.num_free)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.tables[index] = np.concatenate([self.tables[index], self.pool.allocate(1)])

    @rule(tokens=st.lists(st.integers(0, 1), min_size=2, max_size=12))
    def forget(self, tokens: list[int]) -> None:
        self.pool.forget(digests_of(tokens))
        assert self.pool.lookup(digests_of(tokens)).size == 0

    @precondition(lambda self: self.tables and self.pool.num_free)
    @rule(data=st.data())
    def write_last(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        table = self.tables[index]
        if self.pool.ref_counts[table[-1]] > 1:
            target = self.pool.allocate(1)
            self.pool.release(table[-1:])
            self.tables[index] = np.concatenate([table[:-1], target])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @rule()
    def reset(self) -> None:
        assert self.pool.reset_prefix_cache() == (not self.tables)

    @invariant()
    def conserved(self) -> None:
        self.pool.check(self.tables)
        report = self.pool.report()
        assert self.pool.num_free + report.shared + report.private == self.num_blocks

    def teardown(self) -> None:
        for table in self.tables:
            self.pool.release(table)
        assert self.pool.num_free == self.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(stateful_step_count=40)
