"""The files in deploy/ that Ray's own `serve run` and `serve deploy` take: whole, without a key that is never read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from shoal.deploy.app import build_app
from shoal.deploy.config import TINY_MODEL, ServeConfig, from_dict, plan_model

DEPLOY = TINY_MODEL.parent.parent
FILES = sorted(DEPLOY.glob("*.yaml"))
SPLITS = {"tp1.yaml": (1, 1), "tp2.yaml": (2, 1), "tp4.yaml": (4, 1), "tp2_pp2.yaml": (2, 2)}


def unknown_keys(kind: type[BaseModel], value: dict[str, Any]) -> set[str]:
    """Keys that Serve's schema does not know: it ignores them. What is under a plain dictionary is the user's."""
    unknown = value.keys() - kind.model_fields.keys()
    for key, item in value.items():
        field = kind.model_fields.get(key)
        parts = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                for one in item if isinstance(item, list) else [item]:
                    unknown |= {f"{key}.{name}" for name in unknown_keys(part, one)}
    return unknown


def replica_of(application: Application) -> Any:
    """The options that Serve receives for the only model's deployment."""
    deployment: Any = application._bound_deployment
    replica = deployment.init_args[1]
    return replica._bound_deployment


def test_unknown_keys_are_seen() -> None:
    value = {"applications": [{"import_path": "a:b", "arg": {}}], "http_options": {"prot": 1}, "proxy": "x"}
    assert unknown_keys(ServeDeploySchema, value) == {"applications.arg", "http_options.prot", "proxy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shipped_files_are_whole(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert unknown_keys(ServeDeploySchema, content) == set()
    schema = ServeDeploySchema.model_validate(content)
    [application] = schema.applications
    assert application.import_path == "shoal.deploy.app:build_app"
    config = from_dict(ServeConfig, application.args)
    assert [plan_model(model, device="cpu").name for model in config.models] == ["tiny"]
    assert isinstance(build_app(application.args), Application)


@pytest.mark.parametrize(("name", "split"), SPLITS.items())
def test_every_rank_has_a_bundle(name: str, split: tuple[int, int]) -> None:
    [application] = yaml.safe_load((DEPLOY / name).read_text())["applications"]
    replica = replica_of(build_app(application["args"]))
    engine = replica.init_args[1]
    parallel = engine.parallel
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == split
    options = replica._replica_config
    if parallel.world_size == 1:
        assert options.placement_group_bundles is None
        return
    assert len(options.placement_group_bundles) == 1 + parallel.world_size
    assert options.placement_group_strategy == ("PACK" if split[1] > 1 else "STRICT_PACK")
    assert engine.device in ("cpu", "cuda"), "the replica's process could not tell"


def test_how_long_ranks_may_take_to_start_is_said_beside_serves_own_times() -> None:
    [application] = yaml.safe_load((DEPLOY / "tp2.yaml").read_text())["applications"]
    application["args"]["models"][0]["deployment_config"]["group_start_timeout_s"] = 7200
    assert replica_of(build_app(application["args"])).init_args[2].group_start_timeout == 7200


def test_logging_is_serves_own_setting() -> None:
    [application] = yaml.safe_load((DEPLOY / "tp2.yaml").read_text())["applications"]
    settings = application["args"]["models"][0]["deployment_config"]
    settings["logging_config"] = {"log_level": "DEBUG", "encoding": "JSON"}
    found = replica_of(build_app(application["args"])).logging_config
    assert (found["log_level"], found["encoding"]) == ("DEBUG", "JSON")
    settings["logging_config"] = {"log_level": "LOUD"}
    with pytest.raises(ValueError, match='Got "LOUD" for log_level'):
        build_app(application["args"])


def test_the_files_have_one_form() -> None:
    """They differ in the split alone, so that one can be compared with another."""
    bodies = []
    for name, (tp, pp) in SPLITS.items():
        content = yaml.safe_load((DEPLOY / name).read_text())
        kwargs = content["applications"][0]["args"]["models"][0]["engine_kwargs"]
        assert (kwargs.pop("tensor_parallel_size"), kwargs.pop("pipeline_parallel_size")) == (tp, pp)
        bodies.append(content)
    assert all(body == bodies[0] for body in bodies)
