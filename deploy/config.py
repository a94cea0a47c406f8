"""What users configure: Ray Serve LLM's shapes, and Shoal's application around them.

Unknown keys are errors that name the nearest key. Nothing here imports torch or ray, so that a wrong configuration is
known within a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..replicas.config import EngineConfig, ModelFacts
from ..replicas.errors import ConfigError
from ..replicas.models.checkpoint import list_tensors, read_model_facts, resolve_model_path
from ..replicas.text.tokenizer import Tokenizer
from .engine_args import EngineArgs, without_known
from .nearest import did_you_mean

TINY_MODEL = Path(__file__).parent / "models" / "tiny"

# Ray Serve LLM's settings that Shoal knows and does not need.
_IGNORED_LLM_FIELDS = frozenset({"callback_config", "experimental_configs", "llm_engine", "log_engine_metrics"})
Kind = TypeVar("Kind", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelLoadingConfig(_Strict):
    """`model_id` is the name that clients use. `model_source`: a folder, a hub id, or `tiny`; model_id if absent."""

    model_id: str = Field(min_length=1)
    model_source: str | None = None
    tokenizer_source: str | None = None


class DeploymentConfig(_Strict):
    """Serve's settings of a model's replicas."""

    num_replicas: int | None = Field(default=None, ge=1)
    autoscaling_config: dict[str, Any] | None = None
    max_ongoing_requests: int = Field(default=10_000, ge=1)
    ray_actor_options: dict[str, Any] = {}
    logging_config: dict[str, Any] | None = None  # Serve's LoggingConfig; ranks have its level
    health_check_period_s: float = Field(default=1.0, gt=0)
    health_check_timeout_s: float = Field(default=3.0, gt=0)
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0)
    max_constructor_retry_count: int | None = Field(default=None, ge=1)  # None: Serve's own
    graceful_shutdown_wait_loop_s: float = Field(default=1.0, ge=0)
    group_start_timeout_s: float = Field(default=1800.0, gt=0)  # for a replica's ranks to meet and load

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> DeploymentConfig:
        if self.num_replicas is not None and self.autoscaling_config is not None:
            raise ValueError("num_replicas and autoscaling_config exclude each other; give one")
        return self


class PlacementGroupConfig(_Strict):
    """What Ray keeps for the ranks of a replica, where it is not to be chosen: each one's bundle, or all of them.

    The replica's own process has a bundle before these.
    """

    bundle_per_worker: dict[str, float] | None = None
    bundles: list[dict[str, float]] | None = None
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = None

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> PlacementGroupConfig:
        if self.bundle_per_worker is not None and self.bundles is not None:
            raise ValueError("bundle_per_worker and bundles exclude each other; give one")
        return self

    def rank_bundles(self, world_size: int) -> list[dict[str, float]] | None:
        """A bundle for every rank; None where they are to be chosen. Raises ConfigError for another number of them."""
        if self.bundle_per_worker is not None:
            return [dict(self.bundle_per_worker) for _ in range(world_size)]
        if self.bundles is not None and len(self.bundles) != world_size:
            raise ConfigError(
                f"placement_group_config has {len(self.bundles)} bundles and the model {world_size} ranks; give one "
                "for each (the replica's own process has another), or bundle_per_worker"
            )
        return self.bundles


def _known_kwargs(value: Any) -> Any:
    return without_known(value) if isinstance(value, dict) else value


class LLMConfig(_Strict):
    """One model, as Ray Serve LLM describes it."""

    model_loading_config: ModelLoadingConfig
    engine_kwargs: Annotated[EngineArgs, BeforeValidator(_known_kwargs)] = Field(default_factory=EngineArgs)
    accelerator_type: str | None = None
    placement_group_config: PlacementGroupConfig | None = None
    deployment_config: DeploymentConfig = Field(default_factory=DeploymentConfig)
    runtime_env: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_has_no_effect(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value.keys() & _IGNORED_LLM_FIELDS:
            warnings.warn(f"LLMConfig.{key} has no effect in Shoal", stacklevel=2)
        return {key: item for key, item in value.items() if key not in _IGNORED_LLM_FIELDS}

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.engine_kwargs.served_model_name or self.model_loading_config.model_id


class LLMServingArgs(_Strict):
    """What Ray Serve LLM's `build_openai_app` takes."""

    llm_configs: list[LLMConfig] = Field(min_length=1)


class ServeConfig(_Strict):
    """The whole application: the models and the HTTP edge in front of them.

    `local` says that only this machine can reach the server: the admin routes are then open where no key is set, and
    replicas listen on loopback if their Ray has one node.
    """

    models: list[LLMConfig] = Field(min_length=1)
    num_routers: int = Field(default=1, ge=1)
    api_keys: list[str] = []
    admin_keys: list[str] = []
    local: bool = False

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"two models have one name among {names}")
        if any(not key.strip() for key in (*self.api_keys, *self.admin_keys)):
            raise ValueError("an API key is empty")
        return self


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model whose folder was found and whose settings were seen to work together."""

    name: str
    root: str  # where it comes from, as its user said it
    folder: Path
    tokenizer_folder: Path
    facts: ModelFacts
    engine: EngineConfig  # unresolved: the replica resolves it for its own device
    llm: LLMConfig


def from_dict(kind: type[Kind], value: Mapping[str, Any]) -> Kind:
    """`value` as a configuration. Raises ConfigError that names the key, and the nearest one for an unknown key."""
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        raise ConfigError(_explain(kind, error)) from None


def plan_model(llm: LLMConfig, *, device: str) -> ModelPlan:
    """Find the model and check its settings for `device`, "cpu" or "cuda". Raises ConfigError or ModelError."""
    loading, args = llm.model_loading_config, llm.engine_kwargs
    root = loading.model_source or loading.model_id
    folder = model_folder(root, args.revision)
    tokenizer = loading.tokenizer_source or args.tokenizer
    tokenizer_folder = model_folder(tokenizer) if tokenizer else folder
    facts = read_model_facts(folder)
    if args.load_format != "dummy":
        list_tensors(folder)  # a missing or truncated file is found here, in a moment
    Tokenizer.from_folder(tokenizer_folder)  # and so is a tokenizer that no router could load
    engine = args.engine_config(folder)
    try:
        engine.resolve(facts, device)
    except ConfigError as error:
        raise args.in_users_words(error) from None
    if llm.placement_group_config is not None:
        llm.placement_group_config.rank_bundles(engine.parallel.world_size)
    return ModelPlan(llm.name, root, folder, tokenizer_folder, facts, engine, llm)


def model_folder(source: str, revision: str | None = None) -> Path:
    """The folder of `tiny`, of a local model, or of a hub id's snapshot."""
    return TINY_MODEL if source == "tiny" else resolve_model_path(source, revision)


def _explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first finding in one sentence; unknown keys first, for a misspelt key is also missing under its name."""
    findings = error.errors(include_url=False)
    first = next((one for one in findings if one["type"] == "extra_forbidden"), findings[0])
    path = [str(part) for part in first["loc"]]
    if first["type"] == "extra_forbidden":
        return f"unknown key {'.'.join(path)!r}{did_you_mean(path[-1], _keys_at(kind, path[:-1]))}"
    where = ".".join(path) or kind.__name__
    if first["type"] == "missing":
        return f"{where} is required"
    if first["type"] == "value_error":
        return f"{where}: {first.get('ctx', {}).get('error')}"
    return f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]} (got {first['input']!r})"


def _keys_at(kind: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that are known at a place of a configuration."""
    for part in path:
        field = kind.model_fields.get(part)
        if field is not None:
            kind = _model_of(field.annotation) or kind
    return list(kind.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation, which may be a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in getattr(annotation, "__args__", ()) if (found := _model_of(part))), None)
