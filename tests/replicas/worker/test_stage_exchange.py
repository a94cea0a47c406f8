"""What stages send each other, and when the first one asks for tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shoal.replicas.parallel.comm import ParallelContext
from shoal.replicas.parallel.pipeline import PipelineLinks
from shoal.replicas.parallel.process_groups import ProcessGroups
from shoal.replicas.plan import DEVICE_TOKEN, StepPlan
from shoal.replicas.worker.stage_exchange import StageExchange, make_exchange
from tests.support.stages import QueuedLinks

CPU = torch.device("cpu")
NUM_ROWS, HIDDEN = 4, 3


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 2), (1, 3)])
def test_links_join_neighbours_of_one_tp_rank_and_the_last_stage_with_the_first(tp_size: int, pp_size: int):
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    groups = [ProcessGroups(store, rank, CPU, "127.0.0.1") for rank in range(tp_size * pp_size)]
    num_steps = 3 * pp_size
    kept: list[PipelineLinks] = []  # what has not been taken goes with the sender's end of the link

    def stage_of(rank: int) -> list[int]:
        links = PipelineLinks.connect(
            groups[rank].open, CPU, rank=rank, tp_size=tp_size, pp_size=pp_size, max_in_flight=2 * pp_size
        )
        kept.append(links)
        x, tokens, taken = torch.zeros(HIDDEN), torch.zeros(NUM_ROWS, dtype=torch.int64), []
        for step in range(num_steps):
            if rank >= tp_size:
                links.receive_hidden(x)
                assert x.tolist() == [100 * step + rank - tp_size] * HIDDEN
            elif step >= pp_size:
                links.receive_tokens(tokens)
                taken.append(int(tokens[0]))
            x.fill_(100 * step + rank)
            if rank < tp_size * (pp_size - 1):
                links.send_hidden(x)
                x.zero_()
            else:
                tokens.fill_(100 * step + rank)
                links.return_tokens(tokens)
        return taken

    with ThreadPoolExecutor(len(groups)) as pool:
        taken = list(pool.map(stage_of, range(len(groups))))
    last = tp_size * (pp_size - 1)
    for tp_rank in range(tp_size):
        assert taken[tp_rank] == [100 * step + last + tp_rank for step in range(num_steps - pp_size)]


def plan(step: int, rows: Sequence[int], tokens: Sequence[int], sampled: Sequence[int]) -> StepPlan:
    ints = [np.array(values, np.int32) for values in (rows, [9] * len(rows), [1] * len(rows), tokens)]
    return StepPlan(step, *ints, np.arange(len(sampled), dtype=np.int32), np.array(sampled, np.int32))


class FirstStage:
    """The first of `num_stages`, whose last stage has returned `step + 1` as every row's token of each step."""

    def __init__(self, num_stages: int) -> None:
        self.last_tokens = torch.zeros(NUM_ROWS, dtype=torch.int64)
        self.returned: deque[Tensor] = deque()
        self.links = QueuedLinks(0, [deque() for _ in range(num_stages)], self.returned)
        context = ParallelContext(pp_size=num_stages, pp=self.links)
        exchange = make_exchange(context, self.last_tokens, 8, HIDDEN, torch.float32)
        assert isinstance(exchange, StageExchange)
        self.exchange = exchange

    def run(self, step: int, rows: Sequence[int], tokens: Sequence[int], sampled: Sequence[int]) -> int:
        """The step whose tokens it reads."""
        self.exchange.recv_before_step(plan(step, rows, tokens, sampled))
        if sampled:
            self.returned.append(torch.full((NUM_ROWS,), step + 1))
        return int(self.last_tokens[0]) - 1


def test_the_first_stage_takes_just_the_tokens_that_the_step_reads():
    stage = FirstStage(num_stages=4)
    assert stage.run(0, [0, 1], [5, 6], [0, 1]) == -1
    assert stage.run(1, [2], [5], [2]) == -1
    assert stage.run(2, [3], [7], []) == -1  # a chunk that ends no context: no tokens of it will come
    assert stage.run(3, [0], [DEVICE_TOKEN], [0]) == 0
    assert stage.run(4, [0, 2], [11, DEVICE_TOKEN], [0, 2]) == 1
    assert stage.run(5, [0], [DEVICE_TOKEN], [0]) == 4
    assert len(stage.returned) == 1


def test_tokens_that_nobody_reads_do_not_heap_up():
    stage = FirstStage(num_stages=2)
    for step in range(20):
        stage.run(step, [step % 2], [5], [step % 2])
        assert len(stage.returned) <= 2
    stage.exchange.synchronize()
    assert not stage.returned
    assert stage.last_tokens.tolist() == [20] * NUM_ROWS


def test_hidden_states_leave_from_a_buffer_that_stays():
    links = QueuedLinks(0, [deque(), deque()], deque())
    exchange = make_exchange(ParallelContext(pp_size=2, pp=links), torch.zeros(NUM_ROWS), 8, HIDDEN, torch.float32)
    assert exchange is not None
    hidden = torch.arange(4 * HIDDEN, dtype=torch.float32).view(4, HIDDEN)
    exchange.stage_output(hidden)  # of a graph that has room for four tokens
    exchange.send_after_step(plan(0, [0, 1], [5, 6], []))
    other = QueuedLinks(1, links.hidden, links.tokens)
    receiver = make_exchange(
        ParallelContext(pp_rank=1, pp_size=2, pp=other), torch.zeros(NUM_ROWS), 8, HIDDEN, torch.float32
    )
    assert receiver is not None
    receiver.recv_before_step(plan(0, [0, 1], [5, 6], []))
    incoming = receiver.incoming(4)
    assert incoming is not None
    assert torch.equal(incoming[:2], hidden[:2])
    assert not incoming[2:].any()


def test_one_stage_exchanges_nothing():
    assert make_exchange(ParallelContext(), torch.zeros(NUM_ROWS), 8, HIDDEN, torch.float32) is None
