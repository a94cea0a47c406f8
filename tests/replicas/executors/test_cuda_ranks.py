"""Ranks on GPUs of their own, over NCCL and over symmetric memory: the tokens of one GPU, and refusals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.replicas.config import ParallelConfig
from shoal.replicas.engine.engine import Engine
from shoal.replicas.errors import ShardGroupError
from shoal.replicas.executors.shard_rank import ShardRank
from shoal.replicas.offline import build_engine
from tests.support.checkpoints import FAMILIES
from tests.support.golden import engine_config, greedy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def start(folder: Path, parallel: ParallelConfig) -> Engine:
    config = engine_config(folder, num_blocks=11, max_num_batched_tokens=11)
    return build_engine(replace(config, device="cuda", parallel=parallel))


@pytest.mark.parametrize(
    "split",
    [ParallelConfig(2, all_reduce="nccl"), ParallelConfig(2), ParallelConfig(pipeline_parallel_size=2)],
    ids=["tp 2 over nccl", "tp 2", "pp 2"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mixtral"])
def test_two_gpus_give_the_tokens_of_one(family, split, tmp_path):
    folder = FAMILIES[family](tmp_path)
    outputs = []
    for parallel in (ParallelConfig(), split):
        engine = start(folder, parallel)
        try:
            outputs.append([greedy(engine, num_samples=2), greedy(engine)])
            assert engine.load().num_preemptions > 0
        finally:
            engine.shutdown()
    assert outputs[0] == outputs[1]


def test_two_ranks_on_one_gpu_are_refused(tmp_path):
    config = replace(engine_config(FAMILIES["llama"](tmp_path), 2), device="cuda")
    ranks = [ShardRank(config, rank, local_rank=0) for rank in range(2)]
    store = ranks[0].open_store("127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        joining = [pool.submit(rank.join, store, 30.0) for rank in ranks]
        for future in joining:
            with pytest.raises(ShardGroupError, match="ranks 0 and 1 are on one GPU"):
                future.result()
