"""Models split over Ray actors: serving, killed and stopped ranks, replacement, shutdown."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from shoal.cluster.router.router import Router
from shoal.replicas.config import ParallelConfig
from shoal.replicas.offline import build_engine, generate
from shoal.replicas.protocol import Request, SamplingParams
from tests.support.sharded import (
    MODEL,
    Processes,
    deployed,
    placement_groups,
    router,
    shard_actors,
    shard_processes,
    shared_memory,
    tiny_config,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

NUM_STREAMS = 8
TP2, PP2, TP2_PP2 = ParallelConfig(2, 1), ParallelConfig(1, 2), ParallelConfig(2, 2)


def asked(num_tokens: int = 150) -> list[Request]:
    """Seeded and greedy requests."""
    return [
        Request(
            f"{num_tokens}-{i}",
            tuple(range(5 + i, 25 + 2 * i)),
            SamplingParams(max_tokens=num_tokens, temperature=float(i % 2), seed=i, ignore_eos=True),
        )
        for i in range(NUM_STREAMS)
    ]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    """The tokens of `asked()`, by one process with one rank."""
    engine = build_engine(tiny_config(ParallelConfig()))
    completions = generate(engine, asked())
    yield [completions[request.request_id][0].token_ids for request in asked()]
    engine.shutdown()


class Stream:
    """A running request and its number of received tokens."""

    def __init__(self, router: Router, request: Request) -> None:
        self.tokens: list[int] = []
        self.task = asyncio.create_task(self._read(router, request))

    async def _read(self, router: Router, request: Request) -> None:
        async for deltas in router.generate(MODEL, request):
            assert [delta.error for delta in deltas if delta.error] == []
            self.tokens += [token for delta in deltas for token in delta.token_ids]


async def answers(router: Router, requests: list[Request]) -> list[list[int]]:
    streams = [Stream(router, request) for request in requests]
    await asyncio.gather(*(stream.task for stream in streams))
    return [stream.tokens for stream in streams]


def nothing_is_left() -> bool:
    return not shard_processes() and not shard_actors() and not placement_groups()


def all_blocks_are_free(router: Router) -> bool:
    return all(load.num_free_blocks == load.num_blocks for _, load in router.replicas(MODEL))


@pytest.mark.parametrize("parallel", [TP2, PP2, TP2_PP2], ids=["tp2", "pp2", "tp2pp2"])
def test_a_split_model_gives_the_same_tokens_and_leaves_nothing(
    parallel: ParallelConfig, expected: list[list[int]]
) -> None:
    before = shared_memory()

    async def scenario() -> Processes:
        async with router(1) as made:
            assert await answers(made, asked()) == expected
            [(info, _)] = made.replicas(MODEL)
            return Processes.of(info)

    with deployed(tiny_config(parallel)):
        processes = asyncio.run(scenario())
        assert len(processes.ranks) == shard_actors() == parallel.world_size
        assert placement_groups() == 1
        assert {"tcp", "unix"} <= {line.split()[0] for line in processes.left}  # whose end is awaited below
    asyncio.run(until(lambda: not processes.left and nothing_is_left()))
    assert shared_memory() <= before


@pytest.mark.timeout(900)  # every rank is struck twice, and each time a replica starts
@pytest.mark.parametrize(
    ("parallel", "num_replicas"),
    [(TP2, 2), (TP2, 1), (PP2, 1), (TP2_PP2, 1)],
    ids=["tp2, two replicas", "tp2", "pp2", "tp2pp2"],
)
def test_ranks_that_are_killed_or_stopped_are_replaced(
    parallel: ParallelConfig, num_replicas: int, expected: list[list[int]]
) -> None:
    before = shared_memory()
    num_ranks = num_replicas * parallel.world_size

    async def strike(made: Router, rank: int, by: signal.Signals) -> None:
        streams = [Stream(made, request) for request in asked()]
        await until(lambda: all(len(stream.tokens) >= 10 for stream in streams))
        info, _ = made.replicas(MODEL)[0]
        struck = Processes.of(info)
        assert len(struck.ranks) == parallel.world_size
        os.kill(struck.ranks[rank], by)
        await asyncio.gather(*(stream.task for stream in streams))
        assert [stream.tokens for stream in streams] == expected
        await until(lambda: not struck.left)
        await until(lambda: len(made.replicas(MODEL)) == num_replicas)
        assert info.pid not in {other.pid for other, _ in made.replicas(MODEL)}
        await until(lambda: (placement_groups(), shard_actors()) == (num_replicas, num_ranks))
        await until(lambda: len(shard_processes()) == num_ranks)
        assert shared_memory() <= before
        assert await answers(made, asked(30)) == [tokens[:30] for tokens in expected]
        await until(lambda: all_blocks_are_free(made))

    async def scenario() -> None:
        async with router(num_replicas) as made:
            for by in (signal.SIGKILL, signal.SIGSTOP):
                for rank in range(parallel.world_size):
                    await strike(made, rank, by)

    with deployed(tiny_config(parallel), num_replicas):
        asyncio.run(scenario())
    asyncio.run(until(nothing_is_left))


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_do_not_outlive_their_replica(by: signal.Signals, expected: list[list[int]]) -> None:
    async def scenario() -> None:
        async with router(1) as made:
            streams = [Stream(made, request) for request in asked()]
            await until(lambda: all(stream.tokens for stream in streams))
            [(info, _)] = made.replicas(MODEL)
            struck = Processes.of(info)
            os.kill(info.pid, by)
            await asyncio.gather(*(stream.task for stream in streams))
            assert [stream.tokens for stream in streams] == expected
            await until(lambda: not struck.left)
            await until(lambda: placement_groups() == 1)

    with deployed(tiny_config(TP2)):
        asyncio.run(scenario())


def test_an_idle_replica_loses_a_rank_and_is_replaced() -> None:
    async def scenario() -> None:
        async with router(1) as made:
            [(info, _)] = made.replicas(MODEL)
            os.kill(Processes.of(info).ranks[1], signal.SIGKILL)
            await until(lambda: {other.pid for other, _ in made.replicas(MODEL)} - {info.pid})
            assert [len(tokens) for tokens in await answers(made, asked(4))] == [4] * NUM_STREAMS

    with deployed(tiny_config(TP2)):
        asyncio.run(scenario())


def test_a_tensor_that_a_rank_cannot_load_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_config(TP2).model.path, tmp_path / "misshapen")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name)
    save_file({**tensors, name: tensors[name][:-2].clone()}, folder / "model.safetensors")
    message = rf"rank \d of 2 \(node .*, process \d+\): .*{re.escape(name)}"
    with pytest.raises(RuntimeError, match=message), deployed(tiny_config(TP2, folder)):
        pass
    asyncio.run(until(nothing_is_left))
