"""Bundles that replicas request from Ray, and the ranks of their actors."""

from __future__ import annotations

from shoal.cluster.shards.placement import (
    ActorPlacement,
    RankAssignment,
    assign_ranks,
    bundles,
    ray_actor_options,
    spread_stages,
    strategy,
)
from shoal.replicas.config import ParallelConfig


def test_one_shard_lives_in_the_replicas_bundle() -> None:
    (bundle,) = bundles(ParallelConfig(), num_cpus=2, num_gpus_per_shard=1, accelerator_type="H200")
    assert bundle == {"CPU": 2, "GPU": 1, "accelerator_type:H200": 0.001}
    assert ray_actor_options(bundle) == {"num_cpus": 2, "num_gpus": 1, "resources": {"accelerator_type:H200": 0.001}}


def test_more_shards_have_bundles_of_their_own() -> None:
    made = bundles(ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2), num_cpus=1, num_gpus_per_shard=1)
    assert made == [{"CPU": 1}, *({"CPU": 1.0, "GPU": 1},) * 4]
    assert ray_actor_options(made[0]) == {"num_cpus": 1, "num_gpus": 0.0}


def test_without_gpus_no_gpu_is_asked_for() -> None:
    assert bundles(ParallelConfig(), num_cpus=1, num_gpus_per_shard=0) == [{"CPU": 1}]


def test_stages_may_lie_on_several_nodes_and_the_ranks_of_one_may_not() -> None:
    assert strategy(ParallelConfig(tensor_parallel_size=4)) == "STRICT_PACK"
    assert strategy(ParallelConfig(2, 2)) == strategy(ParallelConfig(1, 2)) == "PACK"


def assignments(names: str, parallel: ParallelConfig) -> list[RankAssignment]:
    """The assignments of actors at "a1 b10 ...": node a's GPU 1, node b's GPU 10. The engine is on node a."""
    placements = [
        ActorPlacement(name[0], f"host-{name[0]}", i, tuple(filter(None, [name[1:]])))
        for i, name in enumerate(names.split())
    ]
    return assign_ranks(placements, parallel, "a")


def names(found: list[RankAssignment]) -> list[str]:
    return [assignment.placement.node_id + "".join(assignment.placement.gpus) for assignment in found]


def test_ranks_follow_the_gpus_of_their_node() -> None:
    found = assignments("a10 a3 a9 a0", ParallelConfig(4))
    assert names(found) == ["a0", "a3", "a9", "a10"]
    assert [assignment.actor for assignment in found] == [3, 1, 2, 0]
    assert [assignment.local_rank for assignment in found] == [0, 1, 2, 3]
    assert {assignment.visible_gpus for assignment in found} == {("0", "3", "9", "10")}


def test_a_stage_sits_on_one_node_and_the_first_beside_the_engine() -> None:
    parallel = ParallelConfig(2, 2)
    found = assignments("b1 a0 b0 a1", parallel)
    assert names(found) == ["a0", "a1", "b0", "b1"]
    assert [assignment.local_rank for assignment in found] == [0, 1, 0, 1]
    assert [assignment.visible_gpus for assignment in found] == [("0", "1")] * 4
    assert spread_stages(found, parallel) == []


def test_a_stage_is_spread_only_where_it_must_be() -> None:
    parallel = ParallelConfig(2, 3)
    found = assignments("a0 b0 b1 b2 c0 c1", parallel)
    assert names(found) == ["b0", "b1", "c0", "c1", "a0", "b2"]
    assert spread_stages(found, parallel) == [2]
    assert [assignment.local_rank for assignment in found] == [0, 1, 0, 1, 0, 2]


def test_without_gpus_ranks_keep_the_order_of_their_bundles() -> None:
    found = assignments("b a b a", ParallelConfig(2, 2))
    assert [(assignment.actor, assignment.local_rank, assignment.visible_gpus) for assignment in found] == [
        (1, 0, ()),
        (3, 1, ()),
        (0, 0, ()),
        (2, 1, ()),
    ]
