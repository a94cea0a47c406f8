"""Typed wrappers of Ray's untyped functions."""

from __future__ import annotations

from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup

_ray = cast("Any", ray)


def node_address() -> str:
    """The address at which other nodes reach this one."""
    return _ray.util.get_node_ip_address()


def node_id() -> str:
    return _ray.get_runtime_context().get_node_id()


def create_actor(class_: type, options: dict[str, Any], *args: object) -> Any:
    """The handle of a new actor."""
    return _ray.remote(class_).options(**options).remote(*args)


def named_actor(name: str, namespace: str) -> Any | None:
    """The handle of a named actor; None if there is none."""
    try:
        return _ray.get_actor(name, namespace=namespace)
    except ValueError:
        return None


def kill_actor(actor: Any) -> None:
    _ray.kill(actor)


def bundle_specs(group: PlacementGroup) -> list[dict[str, float]]:
    """The resources of each bundle."""
    return cast("Any", group).bundle_specs
