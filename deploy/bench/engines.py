"""An engine to measure, from a model's name and settings spelled as those of `shoal serve`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...replicas.config import EngineConfig
from ...replicas.engine.engine import Engine
from ...replicas.errors import ConfigError
from ...replicas.models.checkpoint import read_model_facts
from ...replicas.offline import build_engine
from .shapes import open_model

# Prompts must be computed, not cached. No context is longer, which bounds the tables of a step.
_DEFAULTS: dict[str, Any] = {"enable_prefix_caching": False}
_MAX_MODEL_LEN = 16_384


@dataclass(frozen=True, slots=True)
class OpenEngine:
    engine: Engine
    folder: Path
    load_s: float

    @property
    def device(self) -> str:
        return self.engine.config.device


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Parse `name=value` pairs with YAML values. Raises ConfigError."""
    values = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting!r} is not of the form name=value")
        values[name.strip().replace("-", "_")] = yaml.safe_load(value)
    return values


def engine_config(folder: Path, settings: Mapping[str, Any], *, dummy: bool) -> EngineConfig:
    """The configuration of an engine to measure. Raises ConfigError that names the setting."""
    # imported here: an engine configured in Python needs no pydantic
    from ..config import from_dict
    from ..engine_args import EngineArgs

    longest = min(_MAX_MODEL_LEN, read_model_facts(folder).max_position_embeddings)
    defaults = _DEFAULTS | {"max_model_len": longest} | ({"load_format": "dummy"} if dummy else {})
    return from_dict(EngineArgs, defaults | dict(settings)).engine_config(folder)


@contextmanager
def open_engine(model: str, settings: Mapping[str, Any]) -> Iterator[OpenEngine]:
    """An engine on `model` (shape name, tiny, folder, or hub id); shut down at the end."""
    with open_model(model) as (folder, dummy), started(engine_config(folder, settings, dummy=dummy)) as opened:
        yield opened


@contextmanager
def started(config: EngineConfig) -> Iterator[OpenEngine]:
    """An engine of a configuration; shut down at the end."""
    begin = time.perf_counter()
    engine = build_engine(config)
    try:
        yield OpenEngine(engine, Path(config.model.path), time.perf_counter() - begin)
    finally:
        engine.shutdown()
