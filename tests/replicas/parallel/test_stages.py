"""Which layers each pipeline stage runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from shoal.replicas.model_spec import DecoderSpec, ExpertsSpec, LayerSpec
from shoal.replicas.stages import split_costs, stage_layers

LLAMA_8B = DecoderSpec(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    tie_word_embeddings=False,
    layers=(LayerSpec(),) * 32,
)


def largest(costs: list[int], last_extra: int, stages: list[range]) -> int:
    sums = [sum(costs[i] for i in stage) for stage in stages]
    return max(*sums[:-1], sums[-1] + last_extra)


def test_the_largest_stage_is_as_small_as_it_can_be():
    draw = Random(0)
    for _ in range(200):
        costs = [draw.choice([3, 10, 11]) for _ in range(draw.randint(2, 8))]
        num_stages, last_extra = draw.randint(2, len(costs)), draw.choice([0, 7, 30])
        stages = split_costs(costs, last_extra, num_stages)
        assert [layer for stage in stages for layer in stage] == list(range(len(costs)))
        assert all(stages)
        every = [
            [range(a, b) for a, b in zip((0, *cut), (*cut, len(costs)), strict=True)]
            for cut in combinations(range(1, len(costs)), num_stages - 1)
        ]
        assert largest(costs, last_extra, stages) == min(largest(costs, last_extra, split) for split in every)


def test_the_last_stage_has_fewer_layers_for_its_head():
    """The head of an 8B Llama has as many parameters as 2.4 of its layers."""
    assert stage_layers(LLAMA_8B, 1) == [range(32)]
    assert [len(stage) for stage in stage_layers(LLAMA_8B, 2)] == [17, 15]
    assert [len(stage) for stage in stage_layers(LLAMA_8B, 4)] == [8, 9, 9, 6]


def test_layers_of_experts_count_with_all_of_them():
    experts = LayerSpec(experts=ExpertsSpec(num_experts=8, top_k=2, intermediate_size=14_336, renormalize=True))
    mixed = replace(LLAMA_8B, vocab_size=0, layers=(experts, *(LayerSpec(),) * 7))
    assert stage_layers(mixed, 2) == [range(1), range(1, 8)]


def test_every_stage_needs_a_layer():
    with pytest.raises(ValueError, match="32 layers cannot be split over 33 stages"):
        stage_layers(LLAMA_8B, 33)
