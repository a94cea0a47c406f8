"""What `shoal serve` prints when it is ready."""

from __future__ import annotations

from typing import Any

from shoal.cluster.wire.membership import ReplicaInfo
from shoal.deploy.config import ServeConfig, from_dict
from shoal.deploy.server.banner import banner
from shoal.deploy.server.launcher import Endpoint


def lines(replicas: list[ReplicaInfo], **engine: Any) -> list[str]:
    model = {"model_loading_config": {"model_id": "tiny"}, "engine_kwargs": engine}
    config = from_dict(ServeConfig, {"models": [model], "api_keys": ["secret"]})
    return banner(Endpoint("0.0.0.0", 8000, "secret"), config, [replicas]).splitlines()


def replica(name: str, weights: float = 1.5) -> ReplicaInfo:
    return ReplicaInfo(
        name,
        "tiny",
        "10.0.0.1",
        1,
        max_model_len=1000,
        num_blocks=100,
        block_size=16,
        dtype="bf16",
        num_parameters=7 << 20,
        startup_seconds=(("weights", weights), ("KV cache", 0.25)),
    )


def test_capacity_is_of_all_replicas_and_a_split_is_said() -> None:
    banner = lines([replica("a"), replica("b", weights=2.0)], tensor_parallel_size=2, pipeline_parallel_size=3)
    assert "Shoal is ready at http://127.0.0.1:8000/v1" in banner
    assert "  tiny: 7.3 M parameters, bf16, 2 replicas of 6 ranks (tensor parallel 2, stages 3)" in banner
    assert "  KV cache capacity: 3,200 tokens" in banner
    assert "  start of a replica: weights 2.0 s, KV cache 0.2 s" in banner
    assert "  maximum concurrency for requests of 1,000 tokens: 3.20x" in banner
    assert any('-H "authorization: Bearer $SHOAL_API_KEY"' in line for line in banner)
    assert "secret" not in "".join(banner)


def test_a_model_that_is_not_split() -> None:
    assert "  tiny: 7.3 M parameters, bf16, 1 replica" in lines([replica("a")])
    assert "  tiny: no replica is registered" in lines([])
