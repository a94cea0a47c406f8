"""The user's configuration: Ray Serve LLM's models, and Shoal's application around them.

An unknown key is an error that names the nearest one. Imports neither torch nor ray, so a wrong
configuration fails within a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ..replicas.config import GROUP_START_TIMEOUT_S, EngineConfig, ModelFacts
from ..replicas.errors import ConfigError
from ..replicas.models.checkpoint import list_tensors, read_model_facts, resolve_model_path
from ..replicas.text.tokenizer import Tokenizer
from .engine_args import EngineArgs, without_known
from .nearest import did_you_mean

TINY_MODEL = Path(__file__).parent / "models" / "tiny"

# settings of Ray Serve LLM without effect here
_IGNORED_LLM_FIELDS = frozenset({"callback_config", "experimental_configs", "llm_engine", "log_engine_metrics"})
Kind = TypeVar("Kind", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelLoadingConfig(_Strict):
    """Where a model is, and its name in requests."""

    model_id: str = Field(min_length=1, description="The model's name in requests.")
    model_source: str | None = Field(default=None, description="Folder, hub id, or `tiny`. Unset: model_id.")
    tokenizer_source: str | None = Field(
        default=None, description="The tokenizer's folder or hub id. Unset: the model's."
    )


class DeploymentConfig(_Strict):
    """Ray Serve's settings of a model's replicas."""

    num_replicas: int | None = Field(default=None, ge=1, description="Copies of the model. Unset: 1.")
    autoscaling_config: dict[str, Any] | None = Field(default=None, description="Serve's AutoscalingConfig.")
    max_ongoing_requests: int = Field(
        default=10_000, ge=1, description="Most calls that Serve makes of a replica at once."
    )
    ray_actor_options: dict[str, Any] = Field(default={}, description="Ray's options of a replica's actor.")
    logging_config: dict[str, Any] | None = Field(
        default=None, description="Serve's LoggingConfig; ranks use its level."
    )
    health_check_period_s: float = Field(default=1.0, gt=0, description="Seconds between health checks.")
    health_check_timeout_s: float = Field(default=3.0, gt=0, description="Seconds until a health check fails.")
    graceful_shutdown_timeout_s: float = Field(default=30.0, ge=0, description="Seconds until Serve kills a replica.")
    max_constructor_retry_count: int | None = Field(
        default=None, ge=1, description="Starts to try. Unset: Serve's default."
    )
    graceful_shutdown_wait_loop_s: float = Field(
        default=1.0, ge=0, description="Seconds between checks of a draining replica."
    )
    group_start_timeout_s: float = Field(
        default=GROUP_START_TIMEOUT_S, gt=0, description="Seconds for a replica's ranks to start and load the model."
    )

    @model_validator(mode="after")
    def _exclusive(self) -> DeploymentConfig:
        if self.num_replicas is not None and self.autoscaling_config is not None:
            raise ValueError("num_replicas and autoscaling_config exclude each other; give one")
        return self


class PlacementGroupConfig(_Strict):
    """Bundles that Ray reserves for the ranks of a replica, in place of the automatic ones.

    The replica's own process has a bundle before these.
    """

    bundle_per_worker: dict[str, float] | None = Field(default=None, description="The bundle of every rank.")
    bundles: list[dict[str, float]] | None = Field(default=None, description="One bundle for each rank.")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = Field(
        default=None, description="Ray's placement strategy. Unset: by the ranks."
    )

    @model_validator(mode="after")
    def _exclusive(self) -> PlacementGroupConfig:
        if self.bundle_per_worker is not None and self.bundles is not None:
            raise ValueError("bundle_per_worker and bundles exclude each other; give one")
        return self

    def rank_bundles(self, world_size: int) -> list[dict[str, float]] | None:
        """A bundle for every rank; None if automatic. Raises ConfigError unless there is one for each rank."""
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
    accelerator_type: str | None = Field(
        default=None, description="Ray's name of the GPU that ranks need, such as H200."
    )
    placement_group_config: PlacementGroupConfig | None = None
    deployment_config: DeploymentConfig = Field(default_factory=DeploymentConfig)
    runtime_env: dict[str, Any] | None = Field(default=None, description="Ray's runtime environment of the replicas.")

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value.keys() & _IGNORED_LLM_FIELDS:
            warnings.warn(f"LLMConfig.{key} has no effect in Shoal", stacklevel=2)
        return {key: item for key, item in value.items() if key not in _IGNORED_LLM_FIELDS}

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self.engine_kwargs.served_model_name or self.model_loading_config.model_id


class LLMServingArgs(_Strict):
    """The arguments of Ray Serve LLM's `build_openai_app`."""

    llm_configs: list[LLMConfig] = Field(min_length=1, description="The models.")


class ServeConfig(_Strict):
    """The whole application: the models and the routers in front of them."""

    models: list[LLMConfig] = Field(min_length=1, description="The models.")
    num_routers: int = Field(default=1, ge=1, description="HTTP processes in front of the replicas.")
    api_keys: list[str] = Field(default=[], description="Keys that requests must carry. Empty: no key.")
    admin_keys: list[str] = Field(default=[], description="Keys of the admin routes.")
    local: bool = Field(
        default=False,
        description="Only this machine reaches the server. Without admin_keys the admin routes are open; on a Ray of "
        "one node replicas listen on loopback.",
    )

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
    """A model whose folder exists and whose settings work together."""

    name: str
    root: str  # folder or id as the user gave it
    folder: Path
    tokenizer_folder: Path
    facts: ModelFacts
    engine: EngineConfig  # unresolved: the replica resolves it for its own device
    llm: LLMConfig


def from_dict(kind: type[Kind], value: Mapping[str, Any]) -> Kind:
    """Validate `value`. Raises ConfigError that names the key, and for an unknown key the nearest one."""
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
        list_tensors(folder)  # reports a missing or truncated file within a moment
    Tokenizer.from_folder(tokenizer_folder)  # reports a tokenizer that routers could not load
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
    """The first finding in one sentence. Unknown keys come first: a misspelt key is also a missing one."""
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
