"""Reference for the step channel: the same engine and ranks, with a Ray call per plan and result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shoal.replicas.engine.engine import Engine
from shoal.replicas.executors.shard_rank import ShardRank
from shoal.replicas.models.checkpoint import read_model_facts
from shoal.replicas.plan import StepPlan, StepResult
from tests.support.checkpoints import FAMILIES
from tests.support.golden import engine_config, greedy, split_engine


class CalledRank(ShardRank):
    """A rank that is called for every plan."""

    def run(self, plan: StepPlan) -> StepResult:
        assert self._shard is not None
        return self._shard.launch(plan).result()


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_plans_by_channel_and_by_calls_give_the_same_tokens(tmp_path: Path, tp: int, pp: int) -> None:
    import ray

    from benchmarks.actor_calls import ActorCalls

    folder = FAMILIES["llama"](tmp_path)
    facts = read_model_facts(folder)
    config = engine_config(folder, tp, pp, num_blocks=11, max_num_batched_tokens=11).resolve(facts, "cpu")
    actor: Any = ray.remote(CalledRank)
    ranks = [actor.options(num_cpus=0.1).remote(config, rank, rank) for rank in range(2)]
    store = ray.get(ranks[0].open_store.remote("127.0.0.1"))
    ray.get([rank.join.remote(store, 60.0) for rank in ranks])
    loaded = ray.get([rank.load.remote() for rank in ranks])
    by_calls = Engine(config, facts, ActorCalls(ranks, result_rank=pp - 1, num_blocks=loaded[0].num_blocks))
    by_channel = split_engine(folder, tp, pp)
    try:
        assert greedy(by_calls, num_samples=2) == greedy(by_channel, num_samples=2)
    finally:
        by_calls.shutdown()
        by_channel.shutdown()
