"""Resource requests of models, on machines with few cores and with GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shoal.deploy.config import LLMConfig, ModelPlan, from_dict, plan_model
from shoal.deploy.resources import (
    ClusterResources,
    check_gpus,
    cpu_share,
    replica_request,
    resources_of_nodes,
    visible_gpus,
)
from shoal.replicas.errors import ConfigError

LAPTOP = ClusterResources(num_nodes=1, node_cpus=2.0, gpus=0.0)
SERVER = ClusterResources(num_nodes=1, node_cpus=64.0, gpus=8.0)


def model(tp: int = 1, pp: int = 1, **more: Any) -> ModelPlan:
    kwargs = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, **more.pop("engine_kwargs", {})}
    value = {"model_loading_config": {"model_id": "tiny"}, "engine_kwargs": kwargs, **more}
    return plan_model(from_dict(LLMConfig, value), device="cpu")


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_everything_fits_two_cores(tp: int, pp: int, replicas: int) -> None:
    plan = model(tp, pp, deployment_config={"num_replicas": replicas})
    share = cpu_share([plan], LAPTOP)
    request = replica_request(plan, LAPTOP, share)
    bundles = request.bundles or [{"CPU": request.actor_options["num_cpus"]}]
    assert len(bundles) == (1 if tp * pp == 1 else tp * pp + 1)
    assert 0 < replicas * sum(bundle["CPU"] for bundle in bundles) <= 2
    assert all("GPU" not in bundle for bundle in bundles)


def test_where_cores_are_many_every_process_has_one() -> None:
    assert cpu_share([model(4), model(2)], SERVER) == 1.0
    assert cpu_share([model(2, deployment_config={"num_replicas": 2})], ClusterResources(2, 3.0, 0.0)) == 1.0


def test_ranks_have_gpus_and_the_replica_none() -> None:
    request = replica_request(model(2, accelerator_type="H200"), SERVER, 1.0)
    rank = {"CPU": 1.0, "GPU": 1.0, "accelerator_type:H200": 0.001}
    assert (request.device, request.bundles, request.strategy) == ("cuda", [{"CPU": 1.0}, rank, rank], "STRICT_PACK")
    assert request.actor_options == {"num_cpus": 1.0, "num_gpus": 0.0}
    assert replica_request(model(2, 2), SERVER, 1.0).strategy == "PACK"
    alone = replica_request(model(), SERVER, 1.0)
    assert (alone.bundles, alone.actor_options) == (None, {"num_cpus": 1.0, "num_gpus": 1.0})
    assert replica_request(model(2, engine_kwargs={"device": "cpu"}), SERVER, 1.0).device == "cpu"


def test_a_user_may_say_what_ray_keeps() -> None:
    plan = model(
        2,
        placement_group_config={"bundle_per_worker": {"CPU": 2, "GPU": 1}, "strategy": "SPREAD"},
        deployment_config={"ray_actor_options": {"num_cpus": 3, "resources": {"rack": 1}}},
    )
    request = replica_request(plan, SERVER, 1.0)
    assert request.bundles == [{"CPU": 3, "rack": 1}, {"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}]
    assert request.strategy == "SPREAD"


def test_more_ranks_than_gpus() -> None:
    plan = model(2, 2, deployment_config={"num_replicas": 3})
    check_gpus([plan], ClusterResources(1, 8.0, 12.0), "this machine")
    check_gpus([plan], LAPTOP, "this machine")  # auto: it runs on CPU
    with pytest.raises(ConfigError) as caught:
        check_gpus([plan, model(deployment_config={"num_replicas": 1})], ClusterResources(1, 8.0, 12.0), "this machine")
    assert "3 replicas of tiny with tensor_parallel_size 2 and pipeline_parallel_size 2" in caught.value.message
    assert caught.value.message.startswith("13 GPUs are needed for ")
    assert "this machine has 12; lower" in caught.value.message


def test_what_a_running_ray_has() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 0.0}},
        {"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 9.0}},
    ]
    assert resources_of_nodes(nodes) == ClusterResources(2, 16.0, 6.0)
    assert resources_of_nodes([]) == ClusterResources(1, 0.0, 0.0)


@pytest.mark.parametrize(
    ("named", "num"), [(None, 4), ("", 0), ("-1", 0), ("0,2", 2), ("1,-1,2", 1), ("0,1,2,3,4", 4), ("MIG-a,MIG-b", 2)]
)
def test_gpus_that_may_be_used(named: str | None, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: [Path(f"/dev/nvidia{i}") for i in range(4)])
    monkeypatch.setattr(os, "environ", {} if named is None else {"CUDA_VISIBLE_DEVICES": named})
    assert visible_gpus() == num
