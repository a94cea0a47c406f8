"""The replica: one engine in one Ray Serve replica, listening for routers."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve.exceptions import RayServeException

from ...replicas.config import GROUP_START_TIMEOUT_S, EngineConfig, ResolvedConfig
from ...replicas.engine.engine import Engine
from ...replicas.engine.engine_thread import EngineThread
from ...replicas.errors import EngineError
from ...replicas.executors.step_watchdog import StepWatchdog
from ...replicas.offline import build_engine
from ...replicas.protocol import ReplicaLoad, TokenDelta
from ..ray_api import node_address, node_id
from ..shards.shard_actor import build_sharded_engine
from ..shards.shard_group import ShardGroup
from ..wire.directory import DEFAULT_NAME, REGISTER_INTERVAL, DirectoryClient
from ..wire.errors import DirectoryUnavailable
from ..wire.logs import log_to_serve
from ..wire.membership import ReplicaInfo
from .replica_server import ReplicaServer, ServerOptions

if TYPE_CHECKING:
    from ...replicas.executors.local_executor import LocalExecutor

logger = logging.getLogger(__name__)

EXIT_ENGINE_FAILED = 70  # EX_SOFTWARE
_KILL_TIMEOUT = 2.0  # seconds
_STOP_TIMEOUT = 5.0  # seconds for the last step to end


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """Times are in seconds."""

    directory: str = DEFAULT_NAME
    host: str | None = None  # address to listen on; None: the Ray node's
    check_interval: float = 0.5  # between two checks of the engine's progress
    drain_timeout: float = 15.0  # for running requests at a stop
    group_start_timeout: float = GROUP_START_TIMEOUT_S
    server: ServerOptions = field(default_factory=ServerOptions)


class Replica:
    """The Serve deployment class of one model. Tokens bypass Serve.

    Ray sets OMP_NUM_THREADS to the actor's `num_cpus`: on a CPU give the actor its cores, or set
    `config.num_threads`. Ray runs workers at nice 15 unless it starts with RAY_worker_niceness=0.
    """

    _closed = True
    _shards: ShardGroup | None = None  # None: a single shard in this process
    _startup_seconds: Mapping[str, float] = MappingProxyType({})  # by stage

    async def __init__(  # pyright: ignore[reportGeneralTypeIssues]
        self, model_id: str, config: EngineConfig, options: ReplicaOptions | None = None
    ) -> None:
        log_to_serve()
        self._options = options or ReplicaOptions()
        self._directory = DirectoryClient(self._options.directory)
        self._failure: BaseException | None = None
        self._exiting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        secret, self._engine = await asyncio.gather(
            self._directory.secret(), asyncio.to_thread(self.build_engine, config)
        )
        self._watchdog = StepWatchdog.of(self._engine.config)
        self._thread = EngineThread(self._engine, self._on_deltas, self._on_failure)
        self._server = ReplicaServer(self._describe(model_id), secret, self._options.server)
        # A full collection over the 280,000 objects loaded so far takes 0.3 s and stalls every stream.
        gc.collect()
        gc.freeze()
        await self._server.start(self._thread)
        self._thread.start()
        if self._shards is not None:
            self._shards.watch(self._on_failure)
        self._closed = False
        await self._notify_directory(self._directory.register(self._server.info))
        self._tasks = [asyncio.create_task(self._keep_registered()), asyncio.create_task(self._watch_engine())]

    def build_engine(self, config: EngineConfig) -> Engine:
        """Load the model. Raises ConfigError, ModelError and ShardGroupError."""
        if config.parallel.world_size == 1:
            return build_engine(config, start=self._start_here)
        engine, self._shards = build_sharded_engine(config, timeout_s=self._options.group_start_timeout)
        self._startup_seconds = self._shards.startup_seconds
        return engine

    def _start_here(self, config: ResolvedConfig) -> LocalExecutor:
        from ...replicas.executors.local_executor import (
            LocalExecutor,  # loads torch
        )

        executor = LocalExecutor(config)
        self._startup_seconds = executor.startup_seconds
        return executor

    def _describe(self, model_id: str) -> ReplicaInfo:
        """The engine's facts for routers; the port follows later."""
        config, load = self._engine.config, self._engine.load()
        return ReplicaInfo(
            replica_id=_replica_id(),
            model_id=model_id,
            host=self._options.host or node_address(),
            port=0,
            epoch=secrets.randbits(48),
            max_model_len=config.model.max_model_len,
            vocab_size=self._engine.facts.vocab_size,
            num_blocks=load.num_blocks,
            block_size=load.block_size,
            max_num_seqs=config.scheduler.max_num_seqs,
            dtype=config.model.dtype,
            num_parameters=self._engine.facts.num_parameters,
            num_shards=config.parallel.world_size,
            node_id=node_id(),
            pid=os.getpid(),
            startup_seconds=tuple(self._startup_seconds.items()),
        )

    async def check_health(self) -> None:
        """Raise EngineError if the engine is gone or a step hangs."""
        self._check_engine()

    def _check_engine(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine failed: {self._failure}")
        stopped = self._shards.stopped if self._shards is not None else list
        self._watchdog.check(time.monotonic() - self._thread.last_progress, stopped)

    async def info(self) -> ReplicaInfo:
        return self._server.info

    async def load(self) -> ReplicaLoad:
        return self._thread.load()

    async def drain(self) -> None:
        """Accept no more requests; returns after the last one."""
        self._server.start_drain()
        await self._notify_directory(self._directory.register(self._server.info))
        await self._server.drained()

    async def close(self) -> None:
        """Drain for `drain_timeout`, then cut the rest for replay. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        self._server.start_drain()
        await self._notify_directory(self._directory.deregister(self._server.info))
        try:
            async with asyncio.timeout(self._options.drain_timeout):
                await self._server.drained()
        except TimeoutError:
            logger.warning("%d requests were still running at the end of the drain", self._server.num_streams)
        await self._server.close()
        await asyncio.to_thread(self._thread.stop, _STOP_TIMEOUT)
        await asyncio.to_thread(self._engine.shutdown)

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Called and awaited by Serve at shutdown."""
        return None if self._closed else self.close()

    def _on_deltas(self, deltas: list[TokenDelta]) -> None:
        self._watchdog.step_ended(self._thread.step_seconds)
        # Drop the error deltas of a failed engine: routers replay the requests after the cut.
        if self._engine.failure is None:
            self._server.publish(deltas)

    def _on_failure(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: BaseException) -> None:
        """Cut all connections and exit; Serve starts another replica."""
        if self._failure is not None:
            return
        self._failure = error
        logger.critical("the engine failed, and the replica exits", exc_info=error)
        self._exiting = asyncio.create_task(self._exit())  # runs even if the line below raises
        self._server.fail(error)

    async def _exit(self) -> None:
        try:
            if self._shards is not None:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_KILL_TIMEOUT):
                        await asyncio.to_thread(self._shards.kill)
            await self._notify_directory(self._directory.deregister(self._server.info))
        finally:
            self.exit_process()

    def exit_process(self) -> None:
        """Exit without clean-up: a hanging step cannot be joined."""
        os._exit(EXIT_ENGINE_FAILED)

    async def _keep_registered(self) -> None:
        while True:
            await asyncio.sleep(REGISTER_INTERVAL)
            await self._notify_directory(self._directory.register(self._server.info))

    async def _notify_directory(self, call: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(REGISTER_INTERVAL):
                await call
        except (DirectoryUnavailable, TimeoutError) as error:
            logger.warning("failed to notify the directory: %s", error or "no answer")

    async def _watch_engine(self) -> None:
        while True:
            await asyncio.sleep(self._options.check_interval)
            try:
                self._check_engine()
            except EngineError as error:
                self._fail(error)
                return


def _replica_id() -> str:
    """Serve's id of this replica; a random one outside Serve."""
    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return secrets.token_hex(4)
