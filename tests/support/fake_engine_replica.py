"""The product's replica over the real engine, with shards that make tokens up."""

from __future__ import annotations

from shoal.cluster.replica.replica import Replica, ReplicaOptions
from shoal.replicas.config import EngineConfig
from shoal.replicas.engine.engine import Engine
from tests.support.engines import make_engine


class FakeModelReplica(Replica):
    """Raises in step `fail_step` of its engine, when given."""

    async def __init__(  # pyright: ignore[reportGeneralTypeIssues]
        self, model_id: str, config: EngineConfig, options: ReplicaOptions, fail_step: int | None = None
    ) -> None:
        self._fail_step = fail_step
        await super().__init__(model_id, config, options)  # pyright: ignore[reportGeneralTypeIssues]

    def build_engine(self, config: EngineConfig) -> Engine:
        engine, executor = make_engine()
        executor.fail_step = self._fail_step
        return engine
