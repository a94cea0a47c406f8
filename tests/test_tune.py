"""What the tuner tries: shapes of a model as its layers have them, and launches that a device can run."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from benchmarks.tune import SHARED_MEMORY, Shape, candidates, merged, shapes_of
from shoal.kernels.tuning import TOKEN_BUCKETS, Launch, parse_table


def test_shapes_are_those_of_a_rank():
    assert shapes_of("8b") == [
        Shape(6144, 4096), Shape(4096, 4096, after="attention"), Shape(14336, 4096, gated=True),
        Shape(4096, 14336, after="product"), Shape(128256, 4096),
    ]  # fmt: skip
    assert shapes_of("8b/2") == [
        Shape(3072, 4096), Shape(4096, 2048, after="attention"), Shape(7168, 4096, gated=True),
        Shape(4096, 7168, after="product"), Shape(64128, 4096),
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["7b", "8b/two"])
def test_a_model_that_is_not_known_is_named(which):
    with pytest.raises(ValueError, match=which):
        shapes_of(which)


def test_shapes_that_were_not_measured_stay_in_the_table(tmp_path):
    fma, mma = Launch("fma", 4, 1, 256), Launch("mma", 64, 16, 64)
    path = tmp_path / "some-gpu.json"
    path.write_text(merged(path, "Some GPU", {"8x8": {1: fma}, "16x8": {1: None}}))
    path.write_text(merged(path, "Some GPU", {"16x8": {1: mma}}))
    assert parse_table(json.loads(path.read_text())) == {"8x8": {1: fma}, "16x8": {1: mma}}


@pytest.mark.parametrize("num_tokens", TOKEN_BUCKETS)
@pytest.mark.parametrize("shape", shapes_of("1b"), ids=str)
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
