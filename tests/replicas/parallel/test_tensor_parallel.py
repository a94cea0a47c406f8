"""A model split over processes gives the tokens of one process, whatever happens to its sequences meanwhile."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import FAMILIES
from tests.support.golden import check_greedy, check_straits, greedy_of_one_process, split_engine


def check_split(folder, tp: int, pp: int = 1) -> None:
    """Chunks, preemptions, forks and cached prefixes change no token of a model that is split over tp x pp ranks."""
    expected = greedy_of_one_process(folder)
    engine = split_engine(folder, tp, pp)
    try:
        check_greedy(engine, expected)
        check_straits(engine)
    finally:
        engine.shutdown()


def test_one_rank_in_the_same_straits(tmp_path):
    check_split(FAMILIES["llama"](tmp_path), tp=1)


def test_two_ranks(tmp_path):
    check_split(FAMILIES["llama"](tmp_path), tp=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
def test_two_ranks_of_every_family(family, tmp_path):
    check_split(FAMILIES[family](tmp_path / family), tp=2)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"olmo2"}))
def test_four_ranks_of_which_two_share_a_kv_head(family, tmp_path):
    check_split(FAMILIES[family](tmp_path / family), tp=4)
