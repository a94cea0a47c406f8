"""Which way a sum goes, and what happens where the ranks cannot write each other's memory."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import pytest
import torch
from torch._C._distributed_c10d import HashStore, _resolve_process_group

from shoal.kernels.comm.all_reduce import (
    LIMITS_KIB,
    WORLD_SIZES,
    all_reduce_add_rms_norm_ref,
    all_reduce_int8_ref,
    all_reduce_ref,
)
from shoal.kernels.comm.exchange import Algorithm, Exchange, as_rows, buffer_bytes
from shoal.kernels.linear.rms_norm import add_rms_norm
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.parallel import symmetric
from shoal.replicas.parallel.c10d import named_group
from shoal.replicas.parallel.symmetric import Group, SymmetricCollectives, buffer_capacity, open_collectives
from shoal.replicas.parallel.symmetric_memory import NoSymmetricMemory, Place, why_unreachable
from tests.support.symmetric_ranks import run_ranks

ON_TRITON = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
GPU = Group(HashStore(), "stage 0", 0, 2, torch.device("cuda", 0))


class Plain:
    """Collectives that note what they were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("all_reduce")
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("all_gather")
        return x

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append("all_to_all")
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        return add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def check(self) -> None:
        pass


def test_ranks_on_cpu_and_ranks_that_ask_for_nccl_have_no_other_collectives():
    plain = Plain()
    assert open_collectives(plain, replace(GPU, device=torch.device("cpu")), "auto") is plain
    assert open_collectives(plain, GPU, "nccl") is plain


@pytest.mark.parametrize("world_size", [2, 3])
def test_without_symmetric_memory_sums_are_nccls_and_it_is_said_why(world_size, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise NoSymmetricMemory("ranks 0 and 1 are on two machines, a and b")

    monkeypatch.setattr(symmetric, "open_symmetric_memory", refuse)
    plain, group = Plain(), replace(GPU, world_size=world_size)
    why = "two machines, a and b" if world_size == 2 else "there are 3"
    with caplog.at_level(logging.WARNING):
        assert open_collectives(plain, group, "auto") is plain
    assert [why in record.getMessage() for record in caplog.records] == [True]
    for kind in ("triton", "symm_mem"):
        with pytest.raises(ShardGroupError, match=f"all_reduce '{kind}' is not available: .*{why}; use auto or nccl"):
            open_collectives(plain, group, kind)
    if world_size > 2:
        with pytest.raises(ShardGroupError, match=f"batch_invariant is not available for 3 ranks over NCCL: .*{why}"):
            open_collectives(plain, group, "auto", batch_invariant=True)


def test_torch_finds_a_group_by_its_name_as_long_as_somebody_has_it():
    group = named_group(HashStore(), "shoal of a test", 1, 2)
    found = _resolve_process_group("shoal of a test")
    assert (found.rank(), found.size()) == (1, 2)
    found.get_group_store().set("a", "b")
    del group, found
    with pytest.raises(RuntimeError, match="shoal of a test"):
        _resolve_process_group("shoal of a test")


def test_reasons_name_the_ranks_and_what_lies_between_them():
    here = [Place("a", "1", f"GPU-{rank}") for rank in range(3)]
    assert why_unreachable(here, 1, lambda _: True) == ""
    assert "ranks 0 and 2 are on two machines, a and b" in why_unreachable(
        [*here[:2], Place("b", "2", "GPU-2")], 0, lambda _: True
    )
    assert "two machines" in why_unreachable([here[0], Place("a", "2", "GPU-1")], 0, lambda _: True)  # one name
    assert "GPU-0 of rank 0 has no peer access to GPU GPU-1 of rank 1" in why_unreachable(here, 0, lambda _: False)
    assert "rank 2 does not see GPU GPU-0 of rank 0" in why_unreachable(
        here, 2, lambda uuid: None if uuid == "GPU-0" else True
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("hidden_size", [896, 2304, 4096, 5120, 16384])
def test_buffers_hold_every_message_of_the_table(hidden_size, world_size):
    for algorithm, limit in zip(Algorithm, LIMITS_KIB[world_size], strict=True):
        rows = (limit << 10) // (2 * hidden_size)
        for shape in ((rows, hidden_size), as_rows(rows * hidden_size)):
            assert buffer_bytes(algorithm, *shape, 2, world_size) <= buffer_capacity(world_size)


def test_an_alarm_is_an_error_that_says_how_long_was_waited():
    nothing = torch.zeros(1, dtype=torch.int32)
    exchange = Exchange(1, 2, 0, nothing, nothing, nothing, torch.zeros(1, dtype=torch.int32), 77, 1)
    collectives = SymmetricCollectives(Plain(), exchange)
    collectives.check()
    exchange.alarm[0] = 1
    with pytest.raises(ShardGroupError, match="rank 1 of 2 has waited 77 turns"):
        collectives.check()


SHAPES = [(2, 24), (40, 32), (300, 24)]


def norms(exchange: Exchange) -> list[bool]:
    found = []
    for rows in (2, 40):
        x, residual, weight = part(exchange.rank, (rows, 24)), torch.ones(rows, 24), torch.ones(24)
        symmetric.choose = lambda num_bytes, _: Algorithm.ONE_SHOT if num_bytes < 1000 else Algorithm.TWO_SHOT
        total = SymmetricCollectives(Plain(), exchange).all_reduce(x.clone())
        want = add_rms_norm(total, residual.clone(), weight, 1e-5)
        collectives = SymmetricCollectives(Plain(), exchange, every_size=True, fused=False)
        found.append(torch.equal(collectives.all_reduce_add_rms_norm(x, residual, weight, 1e-5), want))
    return found


@ON_TRITON
def test_norms_that_do_not_depend_on_the_size_are_apart_from_the_sum(tmp_path):
    assert run_ranks(tmp_path, 2, norms) == [[True, True], [True, True]]


def part(rank: int, shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank + shape[0]))


def sum_all(
    exchange: Exchange, every_size: bool, quantized: bool
) -> list[tuple[torch.Tensor, torch.Tensor, list[str]]]:
    symmetric.choose = lambda num_bytes, _: Algorithm.ONE_SHOT if num_bytes < 1000 else None  # a table of small sizes
    symmetric.INT8_ABOVE_KIB = 1
    found = []
    for shape in SHAPES:
        plain = Plain()
        collectives = SymmetricCollectives(plain, exchange, every_size=every_size, quantized=quantized)
        residual = torch.ones(shape)
        collectives.all_reduce_add_rms_norm(part(exchange.rank, shape), residual, torch.ones(shape[1]), 1e-5)
        found.append((collectives.all_reduce(part(exchange.rank, shape)), residual, torch.tensor(len(plain.asked))))
        collectives.check()
    return found


@ON_TRITON
@pytest.mark.parametrize(("every_size", "quantized"), [(False, False), (True, False), (True, True)])
def test_what_the_table_lacks_is_plain_or_goes_in_parts(every_size, quantized, tmp_path):
    results = run_ranks(tmp_path, 2, sum_all, every_size, quantized, capacity=18000)
    for step, shape in enumerate(SHAPES):
        parts = [part(rank, shape) for rank in range(2)]
        for rank, result in enumerate(results):
            total, residual, asked = result[step]
            if step > 0 and not every_size:
                assert asked == 2
                assert torch.equal(total, parts[rank])
            elif step > 0 and quantized:
                assert not asked
                assert torch.equal(total, results[0][step][0])
                exact = all_reduce_ref(parts)
                error = (all_reduce_int8_ref(parts) - exact).norm()
                assert (total - exact).norm() <= 1.1 * error
                assert 0 < error < 0.02 * exact.norm()
            else:
                assert not asked
                assert torch.equal(total, all_reduce_ref(parts))
                want = all_reduce_add_rms_norm_ref(parts, torch.ones(shape), torch.ones(shape[1]), 1e-5)[1]
                assert torch.equal(residual, want)
