"""The Ray Serve application: `serve run shoal.deploy.app:build_app ...`, `serve deploy` of a YAML, `shoal serve`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application, Deployment

from ..cluster.replica.replica import Replica, ReplicaOptions
from ..cluster.router.router import Router
from ..cluster.wire.directory import DirectoryClient
from ..cluster.wire.logs import log_to_serve
from ..replicas.errors import ConfigError
from ..replicas.text.tokenizer import Tokenizer
from .config import LLMServingArgs, ModelPlan, ServeConfig, from_dict, plan_model
from .environment import keep_auth_token_private
from .openai.api_state import ApiState, ServedModel
from .openai.auth import KeyRing
from .openai.http_app import create_http_app
from .resources import (
    ClusterResources,
    ReplicaRequest,
    check_gpus,
    cpu_share,
    replica_request,
    resources_here,
    resources_of_nodes,
)

INGRESS = "Ingress"


@dataclass(frozen=True, slots=True)
class IngressSettings:
    """Settings of one router process. `models` are (name, root, tokenizer folder)."""

    models: tuple[tuple[str, str, Path], ...]
    keys: KeyRing


@serve.ingress()
class Ingress:
    """One router process: the HTTP application over its own router."""

    async def __init__(self, settings: IngressSettings, *replicas: Any) -> None:
        log_to_serve()
        # `replicas` are handles that make the deployments part of the application; tokens use the
        # router.
        directory = DirectoryClient()
        self.router = Router(directory, await directory.secret())
        models = [ServedModel(name, Tokenizer.from_folder(path), root) for name, root, path in settings.models]
        for model in models:
            model.tokenizer.prepare_chat()
        self.service = ApiState(self.router, models, settings.keys)
        gc.collect()
        gc.freeze()  # as in a replica: garbage collection of loaded objects would pause streams
        await self.router.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_http_app(self.service, sends_request_id=False)  # Serve's proxy does

    async def __del__(self) -> None:
        await self.router.close()


def build_app(args: Mapping[str, Any] | ServeConfig) -> Application:
    """The application of a ServeConfig. Raises ConfigError or ModelError before anything starts."""
    keep_auth_token_private()  # Ray has just written it under `serve run` and `serve deploy`
    config = args if isinstance(args, ServeConfig) else from_dict(ServeConfig, args)
    available = cluster_resources()
    device = "cuda" if available.gpus else "cpu"
    plans = [plan_model(model, device=device) for model in config.models]
    try:
        check_gpus(plans, available, "the Ray cluster" if ray.is_initialized() else "this machine")
    except ConfigError as error:  # other nodes may join
        warnings.warn(f"{error.message}; replicas wait until there are as many", stacklevel=2)
    return assemble(config, plans)


def build_openai_app(args: Mapping[str, Any] | LLMServingArgs) -> Application:
    """Drop-in for Ray Serve LLM's function: only the import path changes."""
    serving = args if isinstance(args, LLMServingArgs) else from_dict(LLMServingArgs, args)
    return build_app(ServeConfig(models=serving.llm_configs))


def assemble(config: ServeConfig, plans: list[ModelPlan]) -> Application:
    """The application of planned models."""
    settings = IngressSettings(
        tuple((plan.name, plan.root, plan.tokenizer_folder) for plan in plans),
        KeyRing.of(config.api_keys, config.admin_keys, local=config.local),
    )
    ingress = _deployment(
        Ingress,
        name=INGRESS,
        num_replicas=config.num_routers,
        max_ongoing_requests=10_000,
        health_check_period_s=1.0,
        health_check_timeout_s=3.0,
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 0},  # mostly waits; a CPU share would keep models off small nodes
    )
    options = ReplicaOptions(host="127.0.0.1" if config.local and _one_node() else None)
    available = cluster_resources()
    num_cpus = cpu_share(plans, available)
    replicas = [_replicas(plan, replica_request(plan, available, num_cpus), options) for plan in plans]
    return ingress.bind(settings, *replicas)


def replica_deployment_name(model: str) -> str:
    """The Serve deployment of a model's replicas; Serve allows no `/` in its name."""
    return "Replica-" + model.replace("/", "--")


def _replicas(plan: ModelPlan, request: ReplicaRequest, options: ReplicaOptions) -> Application:
    settings = plan.llm.deployment_config
    scaling: dict[str, Any] = {"num_replicas": settings.num_replicas or 1}
    if settings.autoscaling_config is not None:
        scaling = {"autoscaling_config": settings.autoscaling_config}
    if settings.max_constructor_retry_count is not None:
        scaling["max_constructor_retry_count"] = settings.max_constructor_retry_count
    if settings.logging_config is not None:
        scaling["logging_config"] = settings.logging_config
    if request.bundles is not None:
        scaling |= {"placement_group_bundles": request.bundles, "placement_group_strategy": request.strategy}
    deployment = _deployment(
        Replica,
        name=replica_deployment_name(plan.name),
        max_ongoing_requests=settings.max_ongoing_requests,
        health_check_period_s=settings.health_check_period_s,
        health_check_timeout_s=settings.health_check_timeout_s,
        graceful_shutdown_timeout_s=settings.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=settings.graceful_shutdown_wait_loop_s,
        ray_actor_options=request.actor_options,
        **scaling,
    )
    engine = plan.engine
    if request.bundles is not None:  # the replica's own process has no GPU to detect
        engine = replace(engine, device=request.device)
    return deployment.bind(plan.name, engine, replace(options, group_start_timeout=settings.group_start_timeout_s))


def _deployment(kind: type, **options: Any) -> Deployment:
    return cast("Deployment", serve.deployment(kind, **options))


def _one_node() -> bool:
    """Whether the running Ray has one node, so that routers reach replicas on loopback."""
    return ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) == 1


def cluster_resources() -> ClusterResources:
    """The resources of the running Ray, or of this machine before Ray runs."""
    return resources_of_nodes(ray.nodes()) if ray.is_initialized() else resources_here()
