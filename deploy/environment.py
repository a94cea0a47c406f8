"""Environment variables that Ray and Ray Serve read at import, in every process that they start.

Set them before the first `import ray`: `shoal serve` does, and users of `serve run` use the shell
(docs/configuration.md). A variable that is already set keeps its value.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path
from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable's value here, and why it has it."""

    value: str
    why: str


ALWAYS = {
    "RAY_worker_niceness": Variable("0", "At Ray's default, nice 15, workers yield to every other process."),
    "RAY_USAGE_STATS_ENABLED": Variable("0", "No usage reports."),
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": Variable("0", "One hop less between event loops per request and chunk."),
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": Variable("0", "The same hop, in replicas and routers."),
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": Variable(
        "1", "From proxy to router a small answer takes 3 ms by gRPC, 7 ms by actor calls, on 2 busy cores."
    ),
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": Variable(
        "1", "Detects a stuck proxy within seconds; Serve's own is 10 s."
    ),
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": Variable(
        "2", "Detects a stuck proxy within seconds; Serve's own is 10 s."
    ),
}
OWN_RAY_FOLDER = "shoal-ray-"  # prefix that distinguishes a private Ray's folder from one that others may join
OWN_RAY = {  # of a Ray that is started here and has one node
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": Variable(
        "0",
        "Ray's node address is then 127.0.0.1, on Linux too, and its ports stay on loopback. An address given to "
        "ray.init would be resolved to one that other machines can reach.",
    ),
    "RAY_gcs_rpc_server_reconnect_timeout_s": Variable(
        "5", "Processes that lose this Ray's control plane exit after 5 s, not 60 s: nothing restarts it."
    ),
}
PUBLIC = {
    "RAY_SERVE_ENABLE_HA_PROXY": Variable(
        "1", "HAProxy streams past Serve's Python proxy. It binds all interfaces, so it is off on loopback."
    ),
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": Variable(
        "1", "Routers exit sooner; Serve keeps them 30 s for external load balancers."
    ),
}


def make_ray_folder() -> Path:
    """Make a folder for a Ray that is started here. Every Ray on the machine shares Ray's default folder."""
    return Path(tempfile.mkdtemp(prefix=OWN_RAY_FOLDER, dir="/tmp"))  # its sockets' paths must be short


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in {"localhost", "::1"} or host.startswith("127.")


def prepare_environment(host: str, *, own_ray: bool = True) -> None:
    """Set the variables for a Ray that is started here, or, without `own_ray`, for joining a running one.

    Call before ray is imported.
    """
    variables = ALWAYS | ({} if is_loopback(host) else PUBLIC) | (OWN_RAY if own_ray else {})
    settings = {name: variable.value for name, variable in variables.items()}
    if own_ray and "RAY_AUTH_MODE" not in os.environ:
        # Serve's replicas accept pickled calls on every interface, so this Ray's own token keeps
        # other hosts out. Set here, it is not written to ~/.ray/auth_token, which would change the
        # token of `ray start` and `ray job submit` on this machine.
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def keep_auth_token_private(folder: Path | None = None) -> None:
    """Make the token file that Ray wrote readable for its user alone; Ray leaves it readable to all."""
    token = (folder or Path.home() / ".ray") / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
