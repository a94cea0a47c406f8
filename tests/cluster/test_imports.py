"""Routers import neither torch nor Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = (
    "wire.frames",
    "wire.handshake",
    "router.policies",
    "router.queue",
    "router.replay",
    "router.router",
    "replica.replica_server",
)


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages loaded in a new interpreter by the modules."""
    code = "import sys\n" + "".join(f"import shoal.cluster.{m}\n" for m in modules)
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_router_and_wire_load_neither_torch_nor_ray() -> None:
    assert loaded_by(*LIGHT) & {"torch", "triton", "transformers", "numpy", "ray", "pydantic", "fastapi"} == set()


@pytest.mark.parametrize("module", ["wire.directory", "shards.placement", "replica.replica"])
def test_what_deployments_import_does_not_load_torch(module: str) -> None:
    assert loaded_by(module) & {"torch", "triton", "transformers"} == set()
