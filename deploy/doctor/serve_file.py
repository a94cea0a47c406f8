"""A configuration file of `serve run` or `serve deploy`, as the doctor reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ...replicas.errors import ConfigError
from ..config import LLMConfig, LLMServingArgs, ModelPlan, ServeConfig, from_dict, plan_model


def read(path: Path) -> dict[str, Any]:
    """The file's content. Raises ConfigError if its form is wrong."""
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list) or not all(isinstance(one, dict) for one in applications):
        raise ConfigError(f"{path} has no list of applications, as files for `serve run` do; see deploy/tiny.yaml")
    return content


def listens(content: dict[str, Any]) -> tuple[str, int]:
    """Host and port of Serve, by default 127.0.0.1:8000. Raises ConfigError."""
    options = content.get("http_options") or {}
    host, port = (options.get("host", "127.0.0.1"), options.get("port", 8000)) if isinstance(options, dict) else (0, 0)
    if not isinstance(host, str) or not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise ConfigError(f"http_options is {options!r}; it must have a host, and a port below 65536")
    return host, port


def plans_of(content: dict[str, Any], *, device: str) -> list[ModelPlan]:
    """The models of all applications. Raises ConfigError or ModelError."""
    return [plan_model(model, device=device) for one in content["applications"] for model in _models(one)]


def _models(application: dict[str, Any]) -> list[LLMConfig]:
    args = application.get("args") or {}
    if not isinstance(args, dict):
        raise ConfigError(f"args of an application is {args!r}; it must have fields: models, or llm_configs")
    if "llm_configs" in args:
        return from_dict(LLMServingArgs, args).llm_configs
    return from_dict(ServeConfig, args).models
