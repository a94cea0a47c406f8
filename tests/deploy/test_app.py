"""The Serve applications are built, or refused, before anything is started."""

from __future__ import annotations

import pytest
import ray
from ray.serve import Application

from shoal.deploy.app import build_app, build_openai_app, replica_deployment_name
from shoal.replicas.errors import ConfigError, ModelError

TINY = {"model_loading_config": {"model_id": "org/tiny", "model_source": "tiny"}}


def test_both_shapes_build_an_application() -> None:
    running = ray.is_initialized()
    assert isinstance(build_app({"models": [TINY], "num_routers": 2}), Application)
    assert isinstance(build_openai_app({"llm_configs": [TINY]}), Application)
    assert ray.is_initialized() == running, "building an application starts nothing"


def test_deployment_names_have_no_slash() -> None:
    assert replica_deployment_name("org/tiny") == "Replica-org--tiny"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llm_configs'"):
        build_openai_app({"llm_config": [TINY]})
    with pytest.raises(ConfigError, match="5000"):
        build_app({"models": [{**TINY, "engine_kwargs": {"max_model_len": 5000}}]})
    with pytest.raises(ModelError, match="nowhere"):
        build_app({"models": [{"model_loading_config": {"model_id": "m", "model_source": "/nowhere"}}]})
