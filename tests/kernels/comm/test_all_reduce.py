"""All-reduce over symmetric memory, one rank at a time: what the others send lies there before it begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.kernels.backend import Backend, backend_of
from shoal.kernels.comm.all_reduce import (
    LIMITS_KIB,
    all_reduce,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_ref,
    all_reduce_cost,
    all_reduce_int8,
    all_reduce_int8_ref,
    all_reduce_ref,
    choose,
)
from shoal.kernels.comm.exchange import (
    INT8_GROUP,
    INT8_PIECE,
    NUM_BUFFERS,
    STATE_SIZE,
    Algorithm,
    Exchange,
    as_rows,
    buffer_bytes,
    int8_slot_bytes,
    slot_size,
)

BOTH = pytest.mark.parametrize("algorithm", Algorithm)
ON_TRITON = pytest.mark.parametrize("device", ["interpret", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
CAPACITY = 1 << 16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = [(3, 33), (1, 24), (9, 16), (1, 5)]  # of successive steps: they grow, shrink, and end anywhere


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def words_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32 if x.itemsize == 4 else torch.int16)


class Ranks:
    """The memory of all ranks, on one device."""

    def __init__(self, world_size: int, device: torch.device, spin_limit: int = 50) -> None:
        self.world_size = world_size
        size = NUM_BUFFERS * CAPACITY
        self.memory = [torch.full((size,), 255, dtype=torch.uint8, device=device) for _ in range(world_size)]
        peers = torch.tensor([each.data_ptr() for each in self.memory], device=device)
        self.exchanges = [
            Exchange(
                rank, world_size, CAPACITY, memory, peers,
                torch.zeros(STATE_SIZE, dtype=torch.int64, device=device),
                torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda"), spin_limit, 4,
            )
            for rank, memory in enumerate(self.memory)
        ]  # fmt: skip

    def buffer(self, rank: int, step: int) -> torch.Tensor:
        return self.memory[rank].view(NUM_BUFFERS, CAPACITY)[step % NUM_BUFFERS]

    def sent(self, parts: list[torch.Tensor], to: int, algorithm: Algorithm, row: int) -> dict[int, torch.Tensor]:
        """What all ranks send to one: words by their place in its buffer. `row` elements are one row."""
        flat = [words_of(part).flatten() for part in parts]
        rows = -(-len(flat[0]) // row)
        slot = slot_size(algorithm, rows, row, self.world_size)
        others = [rank for rank in range(self.world_size) if rank != to]
        if algorithm is Algorithm.ONE_SHOT:
            return {rank * slot: flat[rank] for rank in others}
        share = -(-rows // self.world_size) * row
        total = words_of(all_reduce_ref(parts)).flatten()
        slices = {rank * slot: flat[rank][to * share : (to + 1) * share] for rank in others}
        sums = {(self.world_size + r) * slot: total[r * share : (r + 1) * share] for r in others}
        return slices | sums

    def step(self, step: int, parts: list[torch.Tensor], algorithm: Algorithm, row: int) -> Iterator[Exchange]:
        """Each rank's turn, all else being there. Afterwards what it sent must be, and nothing of the step before."""
        for rank, exchange in enumerate(self.exchanges):
            for place, words in self.sent(parts, rank, algorithm, row).items():
                self.buffer(rank, step).view(words.dtype)[place : place + len(words)] = words
            yield exchange
            assert exchange.state[0] == (step + 1) << 16
            assert not exchange.alarm[0]
            assert self.buffer(rank, step - 1).eq(255).all()
            mine = {rank, self.world_size + rank}
            for other in set(range(self.world_size)) - {rank}:
                for place, words in self.sent(parts, other, algorithm, row).items():
                    slot = slot_size(algorithm, -(-parts[0].numel() // row), row, self.world_size)
                    if place // slot in mine:
                        assert torch.equal(self.buffer(other, step).view(words.dtype)[place:][: len(words)], words)


def message(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return (torch.randn(shape) * 10 ** torch.randn(shape)).to(device, dtype)


@ON_TRITON
@BOTH
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_sums_have_the_bits_of_the_formula(world_size, algorithm, dtype, device):
    ranks = Ranks(world_size, device)
    for step, shape in enumerate(SHAPES):
        parts = [message(shape, dtype, device) for _ in range(world_size)]
        want = all_reduce_ref(parts)
        for exchange in ranks.step(step, parts, algorithm, as_rows(want.numel())[1]):
            x = parts[exchange.rank].clone()
            assert all_reduce(x, exchange, algorithm) is x
            assert torch.equal(x, want)


@ON_TRITON
@BOTH
@pytest.mark.parametrize("world_size", [2, 8])
def test_sums_are_added_to_the_residual_and_normed(world_size, algorithm, dtype, device):
    ranks = Ranks(world_size, device)
    for step, shape in enumerate(SHAPES):
        parts = [message(shape, dtype, device) for _ in range(world_size)]
        residual, weight = message(shape, dtype, device), message(shape[1:], torch.float32, device)
        want, total = all_reduce_add_rms_norm_ref(parts, residual, weight, 1e-5)
        results = []
        for exchange in ranks.step(step, parts, algorithm, shape[1]):
            own, x = residual.clone(), parts[exchange.rank].clone()
            results.append(all_reduce_add_rms_norm(x, own, weight, 1e-5, exchange, algorithm))
            assert torch.equal(own, total)
            assert torch.equal(x, parts[exchange.rank])
        torch.testing.assert_close(results[0], want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert all(torch.equal(result, results[0]) for result in results)


@ON_TRITON
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@BOTH
def test_a_nan_of_all_bits_is_no_missing_word(algorithm, dtype, device):
    """And a zero keeps its sign."""
    ranks = Ranks(2, device)
    parts = [torch.full((2, 16), -0.0, dtype=dtype, device=device) for _ in range(2)]
    words_of(parts[0])[0, 3] = -1
    want = all_reduce_ref(parts)
    sent = [part.nan_to_num() if rank else part.clone() for rank, part in enumerate(parts)]
    words_of(sent[0])[0, 3] = torch.iinfo(words_of(sent[0]).dtype).max
    for exchange in ranks.step(0, sent, algorithm, as_rows(32)[1]):
        result = all_reduce(parts[exchange.rank].clone(), exchange, algorithm)
        assert result[0, 3].isnan()
        assert result.isnan().sum() == 1
        assert torch.equal(words_of(result)[1], words_of(want)[1])


@ON_TRITON
@BOTH
def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(algorithm, device):
    ranks = Ranks(2, device)
    own = ranks.exchanges[0]
    result = all_reduce(torch.ones(4, 16, device=device), own, algorithm)
    if algorithm is Algorithm.ONE_SHOT:
        assert result.isnan().all()
    else:
        assert result.isnan().any()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert own.alarm[0]
    assert own.state[1 + NUM_BUFFERS]


def in_8_bits(x: torch.Tensor) -> torch.Tensor:
    """Bytes of fp32 [pieces * 4096] on their way."""
    groups = x.view(-1, INT8_PIECE // INT8_GROUP, INT8_GROUP)
    scale = groups.abs().amax(-1) / 127
    units = torch.where(scale[..., None] > 0, groups / scale[..., None], 0.0)
    pieces = (units + 127.5).to(torch.uint8).flatten(1)
    return torch.cat((pieces, scale.contiguous().view(torch.uint8)), 1).flatten()


@ON_TRITON
def test_sums_in_8_bits_are_those_of_the_formula(device):
    """Two pieces, the second not full: one to each of two ranks."""
    ranks, numel = Ranks(2, device), INT8_PIECE + 3000
    parts = torch.randn(2, numel).to(device).unbind()
    want, exact = all_reduce_int8_ref(parts), all_reduce_ref(parts)
    pieces = [
        torch.nn.functional.pad(each, (0, 2 * INT8_PIECE - numel)).view(2, INT8_PIECE) for each in (*parts, exact)
    ]
    slot = int8_slot_bytes(numel, 2)
    for exchange in ranks.exchanges:
        rank, other = exchange.rank, 1 - exchange.rank
        slots = ranks.buffer(rank, 0)[: 4 * slot].view(4, slot)
        slots[other], slots[2 + other] = in_8_bits(pieces[other][rank]), in_8_bits(pieces[2][other])
        x = parts[rank].clone()
        assert all_reduce_int8(x, exchange) is x
        assert not exchange.alarm[0]
        assert (x - exact).norm() < 0.02 * exact.norm()
        own = slice(rank * INT8_PIECE, (rank + 1) * INT8_PIECE)  # a division rounds otherwise on a GPU, now and then
        assert ((x - want)[own].abs() > 1e-4).float().mean() < 0.01
        sent = ranks.buffer(other, 0)[: 4 * slot].view(4, slot)[rank, :INT8_PIECE]
        assert (sent.int() - in_8_bits(pieces[rank][other])[:INT8_PIECE].int()).abs().max() <= 1
        assert ranks.buffer(rank, -1).eq(255).all()


@ON_TRITON
def test_what_a_buffer_does_not_hold_is_refused(device):
    own = Ranks(2, device).exchanges[0]
    with pytest.raises(ValueError, match="a buffer has 65536"):
        all_reduce(torch.ones(1 << 15, device=device), own, Algorithm.ONE_SHOT)
    with pytest.raises(ValueError, match="contiguous"):
        all_reduce(torch.ones(4, 4, device=device).T, own, Algorithm.ONE_SHOT)
    with pytest.raises(ValueError, match="int64"):
        all_reduce(torch.ones(4, dtype=torch.int64, device=device), own, Algorithm.ONE_SHOT)
    x, weight = torch.ones(4, 16, device=device), torch.ones(16, device=device)
    with pytest.raises(ValueError, match="weight has shape"):
        all_reduce_add_rms_norm(x, x.clone(), weight[:8], 1e-5, own, Algorithm.ONE_SHOT)
    with pytest.raises(ValueError, match="residual has shape"):
        all_reduce_add_rms_norm(x, x[:2].clone(), weight, 1e-5, own, Algorithm.ONE_SHOT)
    empty = torch.ones(0, 16, device=device)
    assert all_reduce(empty, own, Algorithm.ONE_SHOT) is empty
    assert own.state[0] == 0


def test_a_cpu_tensor_is_for_another_backend():
    if backend_of(x := torch.ones(2, 2)) is not Backend.TORCH:
        pytest.skip("this process computes by Triton")
    own = Exchange(0, 2, CAPACITY, x, x, x, x, 1, 1)
    with pytest.raises(ValueError, match=r"torch\.distributed"):
        all_reduce(x, own, Algorithm.ONE_SHOT)


@given(st.integers(1, 1 << 26), st.integers(0, 1 << 20), st.sampled_from([2, 4, 8]))
def test_larger_messages_never_go_back_to_more_traffic(num_bytes, more, world_size):
    order = [Algorithm.ONE_SHOT, Algorithm.TWO_SHOT, None]
    small, large = choose(num_bytes, world_size), choose(num_bytes + more, world_size)
    assert order.index(small) <= order.index(large)
    assert choose(num_bytes, 3) is None
    one_shot, two_shot = LIMITS_KIB[world_size]
    assert (small is Algorithm.ONE_SHOT) == (num_bytes <= one_shot << 10)
    assert (small is None) == (num_bytes > max(one_shot, two_shot) << 10)


@given(st.integers(1, 1 << 22), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4]), st.sampled_from(Algorithm))
def test_slots_hold_the_message_and_begin_where_a_wide_store_may(numel, world_size, itemsize, algorithm):
    rows, row = as_rows(numel)
    assert (rows - 1) * row < numel <= rows * row
    slot = slot_size(algorithm, rows, row, world_size)
    assert slot % 16 == 0
    num_slots, per_slot = (
        (world_size, rows) if algorithm is Algorithm.ONE_SHOT else (2 * world_size, -(-rows // world_size))
    )
    assert slot >= per_slot * row
    assert buffer_bytes(algorithm, rows, row, itemsize, world_size) == num_slots * slot * itemsize


def test_costs_are_what_a_rank_sends():
    for world_size, size in itertools.product((2, 4, 8), (1 << 10, 1 << 20)):
        assert all_reduce_cost(size, world_size, Algorithm.ONE_SHOT) == (world_size - 1) * size
        assert all_reduce_cost(size, world_size, Algorithm.TWO_SHOT) <= 2 * size
    assert all_reduce_cost(64, 2, Algorithm.TWO_SHOT) == all_reduce_cost(64, 2, Algorithm.ONE_SHOT)
