"""What replicas ask of Ray, and when their steps count as stuck."""

from __future__ import annotations

from shoal.cluster.placement import bundles, ray_actor_options
from shoal.cluster.watchdog import StepWatchdog
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


def test_a_step_is_stuck_above_the_floor_and_twenty_times_the_slow_ones() -> None:
    watchdog = StepWatchdog(floor=5.0)
    assert watchdog.limit == 120.0
    for _ in range(200):
        watchdog.step_ended(0.01)
    assert watchdog.limit == 5.0
    for _ in range(200):
        watchdog.step_ended(0.5)
    assert watchdog.limit == 10.0
