"""Turns the options of `shoal serve`, or a YAML file of them, into a ServeConfig."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from ..replicas.device import automatic_threads
from ..replicas.errors import ConfigError
from .cli_options import DEPLOYMENT_OPTIONS, ServerArgs
from .config import ModelPlan, ServeConfig, from_dict, plan_model
from .engine_args import EngineArgs
from .environment import is_loopback
from .nearest import did_you_mean
from .resources import visible_gpus
from .vllm_options import NOT_AVAILABLE, WITHOUT_EFFECT

_NOT_OF_THE_ENGINE = {"model", "served_model_name", "num_routers", *ServerArgs.model_fields, *DEPLOYMENT_OPTIONS}


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file, spelled as on the command line, with `-` or `_`. Raises ConfigError."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of options, such as `max-model-len: 1024`")
    options = {str(key).replace("-", "_"): item for key, item in value.items()}
    known = {*_NOT_OF_THE_ENGINE, *EngineArgs.model_fields, *WITHOUT_EFFECT, *NOT_AVAILABLE} - {"config"}
    for key in options:
        if key not in known:
            raise ConfigError(f"{path}: unknown option {key!r}{did_you_mean(key, known)}")
    for key in ("api_key", "admin_key"):
        if isinstance(options.get(key), str):
            options[key] = [options[key]]
    return options


def serve_config(settings: dict[str, Any]) -> tuple[ServerArgs, ServeConfig]:
    """The command's and the application's configuration. Raises ConfigError that names the option."""
    model = settings["model"]
    server = from_dict(ServerArgs, {key: settings[key] for key in ServerArgs.model_fields if key in settings})
    engine = {key: value for key, value in settings.items() if key not in _NOT_OF_THE_ENGINE}
    if server.address is None and "num_threads" not in engine:
        # All ranks of all replicas share this machine's cores; by default each rank would take them all.
        sizes = ("num_replicas", "tensor_parallel_size", "pipeline_parallel_size")
        factors = [settings.get(name, 1) for name in sizes]
        if all(isinstance(factor, int) for factor in factors):  # validation below reports others
            engine["num_threads"] = automatic_threads(max(1, math.prod(factors)))
    config = from_dict(
        ServeConfig,
        {
            "models": [
                {
                    "model_loading_config": {
                        "model_id": settings.get("served_model_name") or model,
                        "model_source": model,
                    },
                    "engine_kwargs": engine,
                    "deployment_config": {
                        **{key: value for key, value in settings.items() if key in DEPLOYMENT_OPTIONS},
                        # A model that fails to load once fails every time, and its user waits.
                        "max_constructor_retry_count": 1,
                    },
                }
            ],
            "num_routers": settings.get("num_routers", 1),
            "api_keys": server.api_key,
            "admin_keys": server.admin_key,
            "local": is_loopback(server.host),
        },
    )
    return server, config


def plan(config: ServeConfig) -> list[ModelPlan]:
    """Check every model of the configuration for this machine. Raises ConfigError or ModelError."""
    device = "cuda" if visible_gpus() else "cpu"
    return [
        plan_model(model, device=device if model.engine_kwargs.device == "auto" else model.engine_kwargs.device)
        for model in config.models
    ]
