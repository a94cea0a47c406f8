"""All-reduce over symmetric memory by ranks that run at once: processes, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from shoal.kernels.all_reduce import Algorithm, Exchange, all_reduce, all_reduce_add_rms_norm, all_reduce_ref
from tests.support.symmetric_ranks import run_ranks

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
SHAPES = [(1, 24), (3, 33), (2, 16), (1, 5), (5, 40), (2, 24)]


def message(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(SHAPES[step], generator=generator) * 10 ** torch.randn(SHAPES[step], generator=generator)


def steps(exchange: Exchange, *algorithms: Algorithm) -> list[torch.Tensor]:
    """The sum of each step, by the algorithms in turn; every other one added to a residual of zeros."""
    sums = []
    for step, shape in enumerate(SHAPES):
        algorithm = algorithms[step % len(algorithms)]
        x, residual = message(exchange.rank, step), torch.zeros(shape)
        if step % 2:
            all_reduce_add_rms_norm(x, residual, torch.ones(shape[1]), 1e-5, exchange, algorithm)
        else:
            residual = all_reduce(x, exchange, algorithm)
        sums.append(residual)
    assert not exchange.alarm[0]
    return sums


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_wait_for_each_other(world_size, tmp_path):
    results = run_ranks(tmp_path, world_size, steps, Algorithm.ONE_SHOT, Algorithm.TWO_SHOT, Algorithm.TWO_SHOT)
    for step in range(len(SHAPES)):
        want = all_reduce_ref([message(rank, step) for rank in range(world_size)])
        assert all(torch.equal(result[step], want) for result in results)
