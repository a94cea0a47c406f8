"""What the tuner tries: shapes of a model as its layers have them, and launches that a device can run."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.tune import MODELS, SHARED_MEMORY, Shape, candidates, shapes_of
from shoal.kernels.tuning import TOKEN_BUCKETS


def test_shapes_are_those_of_a_rank():
    assert shapes_of(MODELS["8b"], 1) == [
        Shape(6144, 4096), Shape(4096, 4096, after="attention"), Shape(14336, 4096, gated=True),
        Shape(4096, 14336, after="product"), Shape(128256, 4096),
    ]  # fmt: skip
    assert shapes_of(MODELS["8b"], 2) == [
        Shape(3072, 4096), Shape(4096, 2048, after="attention"), Shape(7168, 4096, gated=True),
        Shape(4096, 7168, after="product"), Shape(64128, 4096),
    ]  # fmt: skip


@pytest.mark.parametrize("num_tokens", TOKEN_BUCKETS)
@pytest.mark.parametrize("shape", shapes_of(MODELS["1b"], 1), ids=str)
def test_candidates_fit_the_device(shape, num_tokens):
    launches = list(candidates(shape, num_tokens))
    assert launches
    assert len(launches) == len(set(launches))
    for launch in launches:
        if launch.kernel == "fma":
            assert num_tokens == 1
            assert launch.block_m + launch.prefetch <= shape.inputs
        else:
            tiles = (launch.block_n * (2 if shape.gated else 1) + launch.block_t) * launch.block_m
            assert tiles * 2 * launch.num_stages <= SHARED_MEMORY
            assert launch.block_t >= min(num_tokens, 128)
