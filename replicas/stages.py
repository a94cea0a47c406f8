"""The layers of each pipeline stage: contiguous, the costliest stage as cheap as possible.

A cost is the number of parameters that a decode step reads. The last stage has the output head too.
The embedding is free: a step reads one row a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from .model_spec import DecoderSpec


def stage_layers(spec: DecoderSpec, num_stages: int) -> list[range]:
    """The layers of every stage, at least one each."""
    heads = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    costs = [layer_cost(spec.hidden_size, *heads, one) for one in spec.mlp_features]
    return split_costs(costs, spec.vocab_size * spec.hidden_size, num_stages)


def layer_cost(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, features: int) -> int:
    """Parameters of a layer's matrices. features: summed over its experts."""
    heads = 2 * num_heads + 2 * num_kv_heads  # queries, output, keys, values
    return hidden_size * head_dim * heads + 3 * hidden_size * features


def split_costs(costs: Sequence[int], last_extra: int, num_stages: int) -> list[range]:
    """Contiguous ranges with the least largest sum, then the least sum of squares.

    `last_extra` is added to the last one's.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be split over {num_stages} stages, each with one at least")
    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)

    @cache
    def best(first: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Largest sum, sum of squares and stage starts of the layers from `first` on."""
        if stages == 1:
            total = ends[-1] - ends[first] + last_extra
            return total, total * total, (first,)
        options = []
        for end in range(first + 1, len(costs) - stages + 2):
            own, (largest, squares, begins) = ends[end] - ends[first], best(end, stages - 1)
            options.append((max(own, largest), own * own + squares, (first, *begins)))
        return min(options)

    begins = best(0, num_stages)[2]
    return [range(begin, end) for begin, end in zip(begins, (*begins[1:], len(costs)), strict=True)]
