"""All-reduce over symmetric memory by ranks that run at once: processes, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from shoal.kernels.comm.all_reduce import (
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_int8,
    all_reduce_int8_ref,
    all_reduce_ref,
)
from shoal.kernels.comm.exchange import Algorithm, Exchange
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


INT8_SIZES = [5000, 130, 8192, 200]


def int8_message(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    message = torch.randn(INT8_SIZES[step], generator=generator) * torch.randn(INT8_SIZES[step], generator=generator)
    message[:128] = 0.0  # a group without a scale
    if step == 3:
        message[150] = float("nan") if rank else float("inf")
    return message


def int8_steps(exchange: Exchange) -> list[torch.Tensor]:
    sums = [all_reduce_int8(int8_message(exchange.rank, step), exchange) for step in range(len(INT8_SIZES))]
    assert not exchange.alarm[0]
    return sums


def test_sums_in_8_bits_are_off_by_half_a_step_of_each_rounding(tmp_path):
    results = run_ranks(tmp_path, 2, int8_steps, capacity=1 << 16)
    for step in range(len(INT8_SIZES)):
        parts = [int8_message(rank, step) for rank in range(2)]
        want, exact = all_reduce_int8_ref(parts), all_reduce_ref(parts)
        assert torch.equal(results[0][step].nan_to_num(7.0), results[1][step].nan_to_num(7.0))
        got = results[0][step]
        bound = (torch.stack(parts).abs().amax() + exact.abs().amax()) / 254
        finite = want.isfinite()
        assert torch.equal(got.isfinite(), finite)
        assert finite.all() == (step != 3)
        assert ((got - exact)[finite].abs() <= 1.001 * bound.nan_to_num(1.0)).all()
        # A product that is rounded otherwise may take a value that lies between two steps to the other one.
        assert ((got - want)[finite].abs() > 1e-5).float().mean() < 0.01
        assert got[:128].eq(0).all()
