"""Writes docs/configuration.md from the fields of the configuration: `python -m shoal.deploy.configuration_docs`."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .cli_options import flag_names, flag_of, option_groups, option_type
from .config import DeploymentConfig, LLMConfig, LLMServingArgs, ModelLoadingConfig, PlacementGroupConfig, ServeConfig
from .engine_args import EngineArgs
from .environment import ALWAYS, OWN_RAY, PUBLIC, Variable
from .vllm_options import NOT_AVAILABLE, WITHOUT_EFFECT

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_MODELS: dict[type[BaseModel], str] = {
    ServeConfig: "The arguments of `shoal.deploy.app:build_app`.",
    LLMServingArgs: "The arguments of `shoal.deploy.app:build_openai_app`.",
    LLMConfig: "One model: an item of `models` or `llm_configs`.",
    ModelLoadingConfig: "`model_loading_config` of a model.",
    EngineArgs: "`engine_kwargs` of a model: the engine options above, with `_` in place of `-`.",
    DeploymentConfig: "`deployment_config` of a model: Ray Serve's settings of its replicas.",
    PlacementGroupConfig: "`placement_group_config` of a model: bundles in place of the automatic ones. The replica's "
    "own process has a bundle before these.",
}
_VARIABLES: dict[str, Mapping[str, Variable]] = {
    "Always": ALWAYS,
    "With a Ray that `shoal serve` starts": OWN_RAY,
    "With a `--host` that is not loopback": PUBLIC,
}


def document() -> str:
    """The text of docs/configuration.md."""
    return "\n".join(_lines()).rstrip() + "\n"


def _lines() -> Iterator[str]:
    yield from (
        "# Configuration",
        "",
        "<!-- Generated: `make docs`. Edit the fields' descriptions in deploy/, not this page. -->",
        "",
        "`shoal serve MODEL` takes options from three places: flags win over a `--config` file, a file over defaults.",
        "A configuration file of Ray Serve has the keys below.",
        "An unknown option or key is an error that names the nearest.",
        "",
        "## Options of `shoal serve`",
        "",
        "The spelling is vLLM's. In a `--config` file an option has its long name, with `-` or `_`.",
        "",
    )
    for heading, fields in option_groups().items():
        yield from (f"### {heading}", "")
        rows = (
            (_flags(name, field), _type(field.annotation), *_default_and_help(field)) for name, field in fields.items()
        )
        yield from _table(("option", "type", "default", "meaning"), rows)
    yield from ("## Options of vLLM that have no effect", "", "Each is accepted with a warning.", "")
    effectless = ((_code(_flag(name)), option.reason) for name, option in WITHOUT_EFFECT.items())
    yield from _table(("option", "reason"), effectless)
    yield from (
        "## Options of vLLM that are not available",
        "",
        "Each is an error, unless its value asks for nothing.",
        "",
    )
    missing = (
        (_code(_flag(name)), ", ".join(_code(_value(value)) for value in option.harmless), option.reason)
        for name, option in NOT_AVAILABLE.items()
    )
    yield from _table(("option", "accepted value", "reason"), missing)
    yield from ("## Keys of a Ray Serve configuration file", "")
    for model, meaning in _MODELS.items():
        yield from (f"### {model.__name__}", "", meaning, "")
        if model is EngineArgs:
            continue
        rows = (
            (_code(name), _type(one.annotation), *_default_and_help(one)) for name, one in model.model_fields.items()
        )
        yield from _table(("key", "type", "default", "meaning"), rows)
    yield from _environment()


def _environment() -> Iterator[str]:
    yield from ("## Environment variables", "")
    rows = (
        (_code(envvar), f"The same as `{_flag(name)}`; several are separated by spaces.")
        for fields in option_groups().values()
        for name, field in fields.items()
        if (envvar := flag_of(field).envvar)
    )
    yield from _table(("variable", "meaning"), rows)
    yield from (
        "Ray reads the variables below while it starts. `shoal serve` sets them unless they are set;",
        "before `serve run` set them in the shell.",
        "A Ray that `shoal serve` starts also gets `RAY_AUTH_MODE=token` and a random `RAY_AUTH_TOKEN`, unless "
        "`RAY_AUTH_MODE` is set.",
        "",
    )
    for heading, variables in _VARIABLES.items():
        yield from (f"### {heading}", "")
        yield from _table(
            ("variable", "value", "reason"),
            ((_code(name), _code(one.value), one.why) for name, one in variables.items()),
        )


def _flags(name: str, field: FieldInfo) -> str:
    names = flag_names(name, option_type(field)[0], flag_of(field).short)
    return ", ".join(_code(one) for name in names for one in name.split("/"))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default_and_help(field: FieldInfo) -> tuple[str, str]:
    required = field.is_required()
    default = None if required else field.get_default(call_default_factory=True, validated_data={})
    shown = (
        "required" if required else "" if default is None or isinstance(default, BaseModel) else _code(_value(default))
    )
    return shown, field.description or ""


def _type(annotation: Any) -> str:
    """An annotation in words: `int`, `list of str`, `auto, cpu or cuda`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _type(next(part for part in parts if part is not type(None)))
    if origin is Literal:
        return ", ".join(map(_code, parts))
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is dict:
        return "mapping"
    name: str = annotation.__name__
    return {"str": "text", "Path": "path"}.get(name, name)


def _value(value: Any) -> str:
    """`value` as YAML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "unset" if value is None else str(value)


def _code(text: str) -> str:
    return f"`{text}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
