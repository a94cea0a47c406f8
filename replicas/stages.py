"""Which layers each stage of a pipeline runs: contiguous, and of costs as equal as whole layers allow.

The slowest stage sets the pace of all, so the largest cost is made as small as it can be. A cost is a number of
parameters, which is what a decode step reads. The output head counts on the last stage. The embedding costs the first
one memory and no time: of its rows a step reads one a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from .model_spec import DecoderSpec


def stage_layers(spec: DecoderSpec, num_stages: int) -> list[range]:
    """The layers of every stage of `spec`, each stage having one at least."""
    heads = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    costs = [layer_cost(spec.hidden_size, *heads, one) for one in spec.mlp_features]
    return split_costs(costs, spec.vocab_size * spec.hidden_size, num_stages)


def layer_cost(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, features: int) -> int:
    """Parameters of a layer's matrices; norms, biases and routers are too few to matter. features: of all experts."""
    heads = 2 * num_heads + 2 * num_kv_heads  # queries, output, keys, values
    return hidden_size * head_dim * heads + 3 * hidden_size * features


def split_costs(costs: Sequence[int], last_extra: int, num_stages: int) -> list[range]:
    """Contiguous ranges of `costs`, the largest sum of which is least; the last one's sum includes `last_extra`.

    Of splits that are equal in that the one whose other sums are closest to each other.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be split over {num_stages} stages, each with one at least")
    ends = [0]
    for cost in costs:
        ends.append(ends[-1] + cost)

    @cache
    def best(first: int, stages: int) -> tuple[int, int, tuple[int, ...]]:
        """Of the layers from `first` on: the largest sum, the sum of squares, and where each stage begins."""
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
