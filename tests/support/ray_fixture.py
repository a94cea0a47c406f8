"""One local Ray for all tests of a session that need one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Ray with two CPUs, in a folder of its own; everything it started ends with the session."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # read when ray is imported
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    folder = tempfile.mkdtemp(prefix="shoal-ray-", dir="/tmp")  # short: it holds UNIX sockets
    # Workers inherit it and find tests.support. A runtime_env would say it too, but Ray starts such workers through a
    # shell that splits the interpreter's path at spaces.
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        _temp_dir=folder,
        log_to_driver=False,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
