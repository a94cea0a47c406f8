"""Fixtures of the cluster's tests. Event loops are run with `asyncio.run`; nothing here needs a plugin."""

from tests.support.ray_fixture import local_ray

__all__ = ["local_ray"]
