"""The options of `shoal serve`, generated from the fields of the configuration: a new field is a new option."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from .config import DeploymentConfig, ServeConfig
from .engine_args import EngineArgs, Flag
from .vllm_options import NOT_AVAILABLE, WITHOUT_EFFECT

DEPLOYMENT_OPTIONS = ("num_replicas", "group_start_timeout_s")  # fields of DeploymentConfig that are options


class ServerArgs(BaseModel):
    """Options of the command alone, which no configuration file of Ray Serve has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    host: str = Field(default="127.0.0.1", description="Interface to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="0 takes a free one.")
    api_key: Annotated[list[str], Flag(envvar="SHOAL_API_KEY")] = Field(
        default=[], description="Key that requests must carry. May be repeated."
    )
    admin_key: Annotated[list[str], Flag(envvar="SHOAL_ADMIN_KEY")] = Field(
        default=[], description="Key of the admin routes. May be repeated."
    )
    address: str | None = Field(default=None, description="A running Ray to join; without it one is started.")
    config: Path | None = Field(default=None, description="YAML of these options, named as here; flags win.")


def option_groups() -> dict[str, dict[str, FieldInfo]]:
    """The fields that are options of `shoal serve`, by heading, in the order of its help."""
    server = dict(ServerArgs.model_fields)
    ray = {name: server.pop(name) for name in ("address", "config")}
    return {
        "Server": server,
        "Engine": dict(EngineArgs.model_fields),
        "Replicas": {
            **{name: DeploymentConfig.model_fields[name] for name in DEPLOYMENT_OPTIONS},
            "num_routers": ServeConfig.model_fields["num_routers"],
            **ray,
        },
    }


def with_serve_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with a parameter for every option in place of its `**options`; typer reads its signature.

    vLLM's options that Shoal does not have are hidden parameters.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD]
    for fields in option_groups().values():
        parameters += [_parameter(name, field) for name, field in fields.items()]
    for name, option in (WITHOUT_EFFECT | NOT_AVAILABLE).items():
        parameters.append(_hidden_parameter(name, option.kind, getattr(option, "short", None)))
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    return command


def flag_names(name: str, kind: Any, short: str | None = None) -> list[str]:
    """The spellings of an option: `--name`, for a switch also `--no-name`, then the short one."""
    flag = "--" + name.replace("_", "-")
    if kind is bool and not name.startswith("disable_"):
        flag += "/--no-" + flag.removeprefix("--")
    return [flag, *([short] if short else [])]


def flag_of(field: FieldInfo) -> Flag:
    """What the field says of its option."""
    return next((one for one in field.metadata if isinstance(one, Flag)), Flag())


def option_type(field: FieldInfo) -> tuple[Any, tuple[str, ...]]:
    """The type of an option's value, and the values that a Literal allows, which pydantic checks."""
    kind: Any = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        [kind] = [part for part in get_args(kind) if part is not type(None)]
    return (str, get_args(kind)) if get_origin(kind) is Literal else (kind, ())


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind, choices = option_type(field)
    flag, default = flag_of(field), field.get_default() or None
    bounds = {key: getattr(one, key) for one in field.metadata for key in ("ge", "le") if hasattr(one, key)}
    limits = {"min": bounds["ge"], "max": bounds["le"]} if len(bounds) == 2 else {}  # others are pydantic's to check
    option = typer.Option(
        *flag_names(name, kind, flag.short),
        envvar=flag.envvar,
        help=field.description,
        metavar="|".join(choices) or None,
        **limits,
    )
    return _keyword(name, kind, option, field.get_default() if kind is bool else default)


def _hidden_parameter(name: str, kind: type, short: str | None) -> inspect.Parameter:
    return _keyword(name, kind, typer.Option(*flag_names(name, kind, short), hidden=True), None)


def _keyword(name: str, kind: Any, option: Any, default: Any) -> inspect.Parameter:
    annotation = Annotated[kind | None if default is None else kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def given_options(context: typer.Context, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the user gave, as flags or in the environment."""
    sources = {name: context.get_parameter_source(name) for name in options}
    return {name: options[name] for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
