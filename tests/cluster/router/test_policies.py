"""Routing policy: ranking of replicas, and the prefix index."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.router.policies import (
    Candidate,
    PrefixIndex,
    RequestFacts,
    chain_hashes,
    cost,
    has_capacity,
    least_cost,
)

IDLE = Candidate(num_running=0, num_waiting=0, num_blocks=100, num_free_blocks=100, block_size=16, max_num_seqs=8)
FACTS = RequestFacts(num_context_tokens=160)
CANDIDATES = st.builds(
    Candidate,
    num_running=st.integers(0, 20),
    num_waiting=st.integers(0, 20),
    num_blocks=st.just(100),
    num_free_blocks=st.integers(-10, 100),
    block_size=st.just(16),
    max_num_seqs=st.just(8),
    num_cached_tokens=st.integers(0, 160),
)


def test_a_cached_prefix_goes_before_an_emptier_replica_until_the_queue_costs_more() -> None:
    rank = least_cost(max_waiting=32)
    cached = replace(IDLE, num_running=4, num_cached_tokens=144)
    assert rank([IDLE, cached], FACTS) == [1, 0]
    assert rank([IDLE, replace(cached, num_waiting=1)], FACTS) == [0, 1]


def test_ties_go_to_the_one_with_more_free_blocks() -> None:
    assert least_cost(32)([replace(IDLE, num_free_blocks=50), IDLE], FACTS) == [1, 0]


def test_room() -> None:
    busy = replace(IDLE, num_running=8)
    assert not has_capacity(busy, FACTS, max_waiting=0)
    assert has_capacity(busy, FACTS, max_waiting=1)
    assert not has_capacity(replace(busy, num_free_blocks=10), FACTS, max_waiting=1)
    assert has_capacity(replace(busy, num_free_blocks=11), FACTS, max_waiting=1)
    assert has_capacity(replace(busy, num_free_blocks=10, num_cached_tokens=16), FACTS, max_waiting=1)
    # An idle replica, and a request that would never fit, go to the engine: it knows the reason.
    assert has_capacity(replace(IDLE, num_free_blocks=0), FACTS, max_waiting=0)
    assert has_capacity(busy, RequestFacts(num_context_tokens=1600), max_waiting=0)


@given(st.lists(CANDIDATES, max_size=6), st.integers(1, 4))
def test_the_ranking_holds_exactly_those_with_room_by_cost(candidates: list[Candidate], num_samples: int) -> None:
    facts = RequestFacts(160, num_samples)
    ranking = least_cost(4)(candidates, facts)
    assert sorted(ranking) == [i for i, candidate in enumerate(candidates) if has_capacity(candidate, facts, 4)]
    costs = [cost(candidates[i], facts) for i in ranking]
    assert costs == sorted(costs)


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_chains_agree_for_as_many_blocks_as_the_tokens(a: list[int], b: list[int]) -> None:
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    index = PrefixIndex(capacity=100)
    index.add(chain_hashes(a, 4, ""))
    assert index.num_blocks(chain_hashes(b, 4, "")) == common // 4
    assert index.num_blocks(chain_hashes(b, 4, "salt")) == 0


def test_the_index_forgets_the_ends_of_the_oldest_chains_first() -> None:
    index = PrefixIndex(capacity=6)
    old, new = chain_hashes([1] * 16, 4, ""), chain_hashes([2] * 16, 4, "")
    index.add(old)
    index.add(new)
    assert index.num_blocks(new) == 4
    assert index.num_blocks(old) == 2
    index.clear()
    assert index.num_blocks(new) == 0
