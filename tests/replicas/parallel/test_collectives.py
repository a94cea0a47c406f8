"""The plain collectives over gloo: what they compute, and that a row's bits are its own."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.linear.rms_norm import add_rms_norm_ref
from shoal.replicas.parallel.comm import ParallelContext
from tests.support.thread_ranks import run_ranks


def part(rank: int, rows: int, features: int = 40, first: int = 0) -> torch.Tensor:
    """Rows of a rank's tensor; row i is the same in every one of them."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(64, features, generator=generator)[first : first + rows].clone()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_has_the_sum_and_what_is_made_of_it(size):
    residual, weight = part(99, 5), part(98, 1)[0]

    def work(comm: ParallelContext):
        own = residual.clone()
        normed = comm.all_reduce_add_rms_norm(part(comm.tp_rank, 5), own, weight, 1e-6)
        x = part(comm.tp_rank, 5)
        assert comm.all_reduce(x) is x
        return x, own, normed

    total = sum(part(rank, 5) for rank in range(size))
    assert isinstance(total, torch.Tensor)
    normed, added = add_rms_norm_ref(total, residual, weight, 1e-6)
    for got in run_ranks(size, work):
        for value, expected in zip(got, (total, added, normed), strict=True):
            torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(size):
    def work(comm: ParallelContext):
        together = comm.all_reduce(part(comm.tp_rank, 64))
        return together, torch.cat([comm.all_reduce(part(comm.tp_rank, 7, first=i)) for i in range(0, 63, 7)])

    results = run_ranks(size, work)
    for together, apart in results:
        assert torch.equal(together[:63], apart)
        assert torch.equal(together, results[0][0])


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (5,), (0, 4)])
def test_gathered_parts_stand_in_order_of_rank_along_the_last_axis(shape):
    def own(rank: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel()).view(shape) + 100 * rank

    for got in run_ranks(3, lambda comm: comm.all_gather(own(comm.tp_rank))):
        assert torch.equal(got, torch.cat([own(rank) for rank in range(3)], dim=-1))


def test_gathering_takes_a_tensor_that_is_not_contiguous():
    def work(comm: ParallelContext) -> torch.Tensor:
        return comm.all_gather((torch.arange(12).view(3, 4) + comm.tp_rank).T)

    whole = torch.arange(12).view(3, 4).T
    for got in run_ranks(2, work):
        assert torch.equal(got, torch.cat([whole, whole + 1], dim=-1))


def test_blocks_go_to_the_ranks_that_they_are_for():
    def work(comm: ParallelContext) -> torch.Tensor:
        assert comm.tp is not None
        return comm.tp.all_to_all(torch.arange(6).view(3, 2) + 10 * comm.tp_rank)

    for rank, got in enumerate(run_ranks(3, work)):
        assert got.tolist() == [[2 * rank + 10 * other, 2 * rank + 1 + 10 * other] for other in range(3)]


def test_one_rank_has_nothing_to_do():
    x = torch.ones(2, 3)
    comm = ParallelContext()
    assert comm.all_reduce(x) is x
    assert comm.all_gather(x) is x
    assert comm.all_to_all(x) is x
    residual, weight = torch.full((2, 3), 2.0), torch.arange(3.0)
    normed, added = add_rms_norm_ref(x, residual, weight, 1e-6)
    torch.testing.assert_close(comm.all_reduce_add_rms_norm(x, residual, weight, 1e-6), normed)
    assert torch.equal(residual, added)
