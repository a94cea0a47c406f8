"""All-reduce over symmetric memory: ranks as processes on the CPU, in Triton's interpreter, against the formula."""

from __future__ import annotations

import os

import pytest
import torch

from shoal.kernels.all_reduce import (
    Algorithm,
    Exchange,
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_ref,
    all_reduce_ref,
)
from tests.support.symmetric_ranks import run_ranks

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
EPS = 1e-5
# Rows and features of the messages of successive steps: of odd sizes, growing and shrinking.
SHAPES = [(1, 24), (3, 33), (7, 16), (1, 5), (2, 24), (9, 40)]
BOTH = pytest.mark.parametrize("algorithm", Algorithm)


def message(rank: int, step: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(dtype)


def sums(exchange: Exchange, algorithm: Algorithm, dtype: torch.dtype) -> list[torch.Tensor]:
    return [
        all_reduce(message(exchange.rank, step, shape, dtype), exchange, algorithm) for step, shape in enumerate(SHAPES)
    ]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_have_the_bits_of_the_formula_on_every_rank(world_size, dtype, algorithm, tmp_path):
    results = run_ranks(tmp_path, world_size, sums, algorithm, dtype)
    for step, shape in enumerate(SHAPES):
        want = all_reduce_ref([message(rank, step, shape, dtype) for rank in range(world_size)])
        for result in results:
            assert torch.equal(result[step], want)


def normed(exchange: Exchange, algorithm: Algorithm, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results = []
    for step, shape in enumerate(SHAPES):
        residual, weight = message(7, step, shape, dtype), message(8, step, shape[1:], dtype)
        x = message(exchange.rank, step, shape, dtype)
        results.append((all_reduce_add_rms_norm(x, residual, weight, EPS, exchange, algorithm), residual))
        assert torch.equal(x, message(exchange.rank, step, shape, dtype))
    return results


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_are_added_to_the_residual_and_normed(world_size, dtype, algorithm, tmp_path):
    results = run_ranks(tmp_path, world_size, normed, algorithm, dtype)
    tolerance = 2e-6 if dtype is torch.float32 else 2e-3
    for step, shape in enumerate(SHAPES):
        parts = [message(rank, step, shape, dtype) for rank in range(world_size)]
        residual, weight = message(7, step, shape, dtype), message(8, step, shape[1:], dtype)
        want, total = all_reduce_add_rms_norm_ref(parts, residual, weight, EPS)
        for result in results:
            assert torch.equal(result[step][1], total)
            assert torch.equal(result[step][0], results[0][step][0])
            torch.testing.assert_close(result[step][0], want, rtol=tolerance, atol=tolerance)
