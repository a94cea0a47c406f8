"""From the command line's options, or a YAML file of them, to a ServeConfig."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from ..replicas.device import automatic_threads
from ..replicas.errors import ConfigError
from .config import ModelPlan, ServeConfig, from_dict, plan_model
from .engine_args import NOT_AVAILABLE, WITHOUT_EFFECT, EngineArgs
from .environment import is_loopback
from .nearest import did_you_mean
from .resources import visible_gpus

_DEPLOYMENT_OPTIONS = frozenset({"num_replicas", "group_start_timeout_s"})
_SERVER_OPTIONS = _DEPLOYMENT_OPTIONS | {
    *("model", "host", "port", "api_key", "admin_key", "num_routers", "address", "served_model_name")
}


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
    known = [*_SERVER_OPTIONS, *EngineArgs.model_fields, *WITHOUT_EFFECT, *NOT_AVAILABLE]
    for key in options:
        if key not in known:
            raise ConfigError(f"{path}: unknown option {key!r}{did_you_mean(key, known)}")
    for key in ("api_key", "admin_key"):
        if isinstance(options.get(key), str):
            options[key] = [options[key]]
    return options


def serve_config(settings: dict[str, Any]) -> ServeConfig:
    """The application's configuration. Raises ConfigError that names the option."""
    model = settings["model"]
    engine = {key: value for key, value in settings.items() if key not in _SERVER_OPTIONS}
    num_replicas = settings.get("num_replicas", 1)
    if settings.get("address") is None and "num_threads" not in engine:
        # All ranks of all replicas share this machine; each would take its cores for its own otherwise.
        factors = (num_replicas, engine.get("tensor_parallel_size", 1), engine.get("pipeline_parallel_size", 1))
        if all(isinstance(factor, int) for factor in factors):  # what is not is told below
            engine["num_threads"] = automatic_threads(max(1, math.prod(factors)))
    return from_dict(
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
                        **{key: value for key, value in settings.items() if key in _DEPLOYMENT_OPTIONS},
                        # A model that cannot be loaded once cannot be loaded at all, and its user waits.
                        "max_constructor_retry_count": 1,
                    },
                }
            ],
            "num_routers": settings.get("num_routers", 1),
            "api_keys": settings.get("api_key", []),
            "admin_keys": settings.get("admin_key", []),
            "local": is_loopback(settings["host"]),
        },
    )


def plan(config: ServeConfig) -> list[ModelPlan]:
    """Check every model of the configuration for this machine. Raises ConfigError or ModelError."""
    device = "cuda" if visible_gpus() else "cpu"
    return [
        plan_model(model, device=device if model.engine_kwargs.device == "auto" else model.engine_kwargs.device)
        for model in config.models
    ]
