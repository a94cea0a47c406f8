"""All-reduce over the memory of two GPUs: its bits, replays of a graph, who sums, and a rank that stays away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from benchmarks.all_reduce import open_exchange, run_ranks
from shoal.kernels.comm.all_reduce import (
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_ref,
    all_reduce_int8,
    all_reduce_ref,
)
from shoal.kernels.comm.exchange import Algorithm
from shoal.replicas.parallel.collectives import TorchCollectives
from shoal.replicas.parallel.symmetric import Group, open_collectives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SHAPES = [(1, 4096), (3, 4096), (64, 4096), (17, 8192), (200, 2304), (1, 24), (5, 5), (512, 4096)]
HIDDEN = 4096
MILLION = 1_000_000


def message(rank: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1000 * shape[0] + rank)
    wide = torch.randn(shape, generator=generator, device="cuda")
    return (wide * torch.randn(shape, generator=generator, device="cuda").exp()).to(dtype)


def count_wrong_bits(rank: int, world_size: int, store: Store, dtype: torch.dtype) -> dict[str, int]:
    exchange, _ = open_exchange(store, rank, world_size, 16 << 20)
    wrong = {"sum": 0, "residual": 0, "norm": 0, "alarm": 0}
    for algorithm in Algorithm:
        for shape in SHAPES:
            parts = [message(r, shape, dtype) for r in range(world_size)]
            residual, weight = message(7, shape, dtype), message(8, (1, shape[1]), dtype)[0]
            wrong["sum"] += int((all_reduce(parts[rank].clone(), exchange, algorithm) != all_reduce_ref(parts)).sum())
            own = residual.clone()
            normed = all_reduce_add_rms_norm(parts[rank], own, weight, 1e-5, exchange, algorithm)
            want, total = all_reduce_add_rms_norm_ref(parts, residual, weight, 1e-5)
            wrong["residual"] += int((own != total).sum())
            wrong["norm"] += int(not torch.allclose(normed, want, rtol=2e-2, atol=2e-2))
    wrong["alarm"] = int(exchange.alarm[0])
    return wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("world_size", [2, 4])
def test_sums_have_the_bits_of_the_formula(world_size, dtype):
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    for wrong in run_ranks(world_size, count_wrong_bits, dtype):
        assert wrong == {"sum": 0, "residual": 0, "norm": 0, "alarm": 0}


def replay(rank: int, world_size: int, store: Store, num_steps: int) -> dict[str, int]:
    """Steps of a captured graph: messages of several sizes, of other numbers in each, compared on the device."""
    exchange, _ = open_exchange(store, rank, world_size, 8 << 20)
    shapes, count = [(1, HIDDEN), (16, HIDDEN), (64, HIDDEN), (3, HIDDEN)], torch.zeros((), device="cuda")
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def whole(r: int, shape: tuple[int, int]) -> torch.Tensor:  # sums of whole numbers are exact, in any order
        generator = torch.Generator("cuda").manual_seed(r)
        return torch.randint(-500, 500, shape, generator=generator, device="cuda").float()

    own, total = [whole(rank, s) for s in shapes], [sum(whole(r, s) for r in range(world_size)) for s in shapes]

    def steps(number: int) -> None:
        for step in range(number):
            count.add_(1.0)
            algorithm = Algorithm.TWO_SHOT if step % 7 == 0 else Algorithm.ONE_SHOT
            x = all_reduce(own[step % 4] + count, exchange, algorithm)
            wrong.add_((x != torch.add(total[step % 4], count, alpha=world_size)).sum())

    steps(8)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        steps(250)
    for _ in range(num_steps // 250):
        graph.replay()
        count.remainder_(1000.0)
    torch.cuda.synchronize()
    return {"wrong": int(wrong), "alarm": int(exchange.alarm[0]), "steps": int(exchange.state[0]) >> 16}


def test_a_million_steps_of_a_graph():
    for result in run_ranks(2, replay, MILLION):
        assert result == {"wrong": 0, "alarm": 0, "steps": MILLION + 8}


def sum_by(rank: int, world_size: int, store: Store, kind: str, quantized: bool) -> tuple[str, list[float]]:
    group = Group(store, "group", rank, world_size, torch.device("cuda", rank))
    collectives = open_collectives(TorchCollectives(dist.group.WORLD), group, kind, quantized=quantized)
    errors = []
    for rows in (1, 33, 64, 300, 2048):
        parts = [message(r, (rows, HIDDEN), torch.bfloat16) for r in range(world_size)]
        exact = all_reduce_ref(parts).float()
        errors.append(((collectives.all_reduce(parts[rank].clone()).float() - exact).norm() / exact.norm()).item())
        residual, weight = torch.zeros_like(parts[0]), torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        collectives.all_reduce_add_rms_norm(parts[rank].clone(), residual, weight, 1e-5)
        errors[-1] = max(errors[-1], ((residual.float() - exact).norm() / exact.norm()).item())
        collectives.check()
    return type(collectives).__name__, errors


@pytest.mark.parametrize("kind", ["auto", "triton", "symm_mem", "nccl"])
def test_every_choice_of_who_sums(kind):
    name = {"symm_mem": "TorchSymmetricCollectives", "nccl": "TorchCollectives"}.get(kind, "SymmetricCollectives")
    for got, errors in run_ranks(2, sum_by, kind, False):
        assert got == name
        assert max(errors) < (1e-9 if kind == "triton" else 4e-3)


def test_large_messages_in_8_bits():
    for _, errors in run_ranks(2, sum_by, "auto", True):
        assert max(errors[:3]) < 4e-3
        assert min(errors[3:]) > 1e-3  # 2.3 and 16 MiB
        assert max(errors[3:]) < 2e-2


def stay_away(rank: int, world_size: int, store: Store, call: Callable[..., Any]) -> tuple[bool, bool, bool]:
    exchange, _ = open_exchange(store, rank, world_size, 1 << 20)
    x = torch.ones(4, HIDDEN, device="cuda")
    if rank == 0:
        call(x, replace(exchange, spin_limit=1 << 14))
        torch.cuda.synchronize()
    dist.barrier()
    return bool(exchange.alarm[0]), bool(exchange.state[-1]), bool(x.isnan().any())


def one_shot(x: torch.Tensor, exchange: Any) -> None:
    all_reduce(x, exchange, Algorithm.ONE_SHOT)


def two_shot(x: torch.Tensor, exchange: Any) -> None:
    all_reduce(x, exchange, Algorithm.TWO_SHOT)


@pytest.mark.parametrize("call", [one_shot, two_shot, all_reduce_int8])
def test_a_rank_that_stays_away_is_not_waited_for_for_ever(call):
    waiting, absent = run_ranks(2, stay_away, call)
    assert waiting == (True, True, True)
    assert absent == (False, False, False)
