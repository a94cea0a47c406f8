"""Ranks that do not fit each other are refused, and the error says which and in what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.replicas.config import EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.rank_facts import RankFacts, check_facts

FACTS = RankFacts(2, "c0ffee", "1.0", "2.13", "2.28", "3.12", "node boot", "node", "GPU-1")


def test_ranks_that_differ_in_nothing_but_their_gpus_fit():
    check_facts([FACTS, replace(FACTS, device="GPU-2"), replace(FACTS, node="other boot")])


def test_ranks_on_cpu_share_it():
    check_facts([replace(FACTS, device="cpu")] * 4)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("world_size", 4, "the size of the group: rank 0 has 2, rank 1 has 4"),
        ("config", "decaf", "the configuration: rank 0 has c0ffee, rank 1 has decaf"),
        ("shoal", "1.1", "the version of Shoal: rank 0 has 1.0, rank 1 has 1.1"),
        ("torch", "2.12", "the version of torch: rank 0 has 2.13, rank 1 has 2.12"),
        ("nccl", "", "the version of NCCL: rank 0 has 2.28, rank 1 has none"),
        ("python", "3.11", "the version of Python: rank 0 has 3.12, rank 1 has 3.11"),
    ],
)
def test_what_ranks_differ_in_is_named(field, value, what):
    with pytest.raises(ShardGroupError) as caught:
        check_facts([FACTS, replace(FACTS, device="GPU-2", **{field: value})])
    assert what in caught.value.message


def test_two_ranks_on_one_gpu_are_refused():
    with pytest.raises(ShardGroupError, match="ranks 0 and 2 are on one GPU, GPU-1 of node"):
        check_facts([FACTS, replace(FACTS, device="GPU-2"), FACTS])


def test_facts_travel_as_json_and_tell_configurations_apart():
    config = EngineConfig(ModelConfig("folder"))
    facts = RankFacts.of(config, torch.device("cpu"))
    assert RankFacts.from_json(facts.to_json()) == facts
    assert RankFacts.of(replace(config, scheduler=SchedulerConfig(9)), torch.device("cpu")).config != facts.config


def test_facts_of_another_version_are_refused():
    with pytest.raises(ShardGroupError, match="another version of Shoal"):
        RankFacts.from_json('{"world_size": 2}')
