"""All uses of Ray's private interfaces, so that an upgrade of Ray can break one file only."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from ray._private import state
from ray.serve import context


class HttpAddress(NamedTuple):
    host: str
    port: int


def serve_http_address() -> HttpAddress | None:
    """The address of the running Serve's HTTP proxies; None if Serve does not run. No public API reports it."""
    client = cast("Any", context)._get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    return HttpAddress(client.http_config.host, client.http_config.port)


def actor_table() -> list[dict[str, Any]]:
    """Ray's record of every actor. The public list of actors needs the dashboard."""
    return list(cast("Any", state).actors().values())
