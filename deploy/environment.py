"""Variables that Ray and Ray Serve read while they are imported, in every process that they start.

They must stand in the environment before the first `import ray`; `shoal serve` sees to that. Whoever starts the
application with `serve run` sets them in the shell (README). A variable that is already set is left as it is.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

_ALWAYS = {
    # Workers would run at nice 15 and lose to everything else on the machine.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A hop between event loops less on every request and on every piece of a stream.
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # From the proxy to the router by gRPC: 3 ms for a small answer on 2 busy cores, against 7 ms by actor calls.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # A proxy that hangs is noticed in seconds; Serve's own values are 10 s and 10 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
}
# How the folder of a Ray that is started here begins; it is told by that from one that others may join.
OWN_RAY_FOLDER = "shoal-ray-"
# Of a Ray that is started here and has one node.
_OWN_RAY = {
    # Ray then takes 127.0.0.1 for this node's address, on Linux too, and its own ports stay on loopback. An address
    # given to ray.init does not do it: it is resolved to one that other machines can reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nobody starts its control plane again: whoever has lost that ends. Ray's own value is 60 s.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}
_PUBLIC = {
    # HAProxy carries streams past Serve's Python proxy, but it binds all interfaces: not for loopback.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Serve keeps routers for 30 s after their end, for load balancers outside that have to learn of it.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}


def make_ray_folder() -> Path:
    """A folder for a Ray that is started here: Ray's default is shared by every Ray on the machine."""
    return Path(tempfile.mkdtemp(prefix=OWN_RAY_FOLDER, dir="/tmp"))  # its sockets' paths must be short


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in {"localhost", "::1"} or host.startswith("127.")


def prepare_environment(host: str, *, own_ray: bool = True) -> None:
    """Set what Ray should find: a Ray that is started here, or, without `own_ray`, one that runs already.

    Call before ray is imported.
    """
    settings = _ALWAYS | ({} if is_loopback(host) else _PUBLIC)
    if own_ray:
        settings |= _OWN_RAY
        if "RAY_AUTH_MODE" not in os.environ:
            # Serve's replicas take pickled calls on every interface, whatever the node's address: a secret of this
            # Ray alone keeps others out. Given here, it is not written to ~/.ray/auth_token, which would change what
            # `ray start` and `ray job submit` ask for on this machine from then on.
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def keep_auth_token_private(folder: Path | None = None) -> None:
    """Take the token that Ray wrote for this user from everybody else: Ray leaves the file readable to all."""
    token = (folder or Path.home() / ".ray") / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and token.stat().st_mode & 0o077:
        token.chmod(0o600)
