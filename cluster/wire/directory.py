"""The directory: a small named actor that registers replicas and holds the cluster's secret.

If it dies, Ray restarts it with the same secret, and replicas register again within `REGISTER_INTERVAL`.
Routers keep their connections in the meantime.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import ray
from ray.exceptions import RayError

from ...replicas.channel.handshake import new_secret
from ..ray_api import create_actor, kill_actor, named_actor
from .errors import DirectoryUnavailable
from .logs import log_to_stderr
from .membership import Membership, ReplicaInfo

logger = logging.getLogger(__name__)

NAMESPACE = "shoal"
DEFAULT_NAME = "directory"
REGISTER_INTERVAL = 2.0  # seconds
TIME_TO_LIVE = 10.0  # seconds until a registration expires
WATCH_TIMEOUT = 10.0  # seconds of a watch without changes
_EXPIRY_CHECK = 1.0
_STOP_TIMEOUT = 2.0  # seconds; a restarting directory must not delay a shutdown
_ANSWER_TIMEOUT = 60.0  # seconds, including the start of the actor's process


class Directory:
    """The actor's logic, in plain asyncio."""

    def __init__(self, secret: bytes, time_to_live: float = TIME_TO_LIVE) -> None:
        self._secret = secret
        self._time_to_live = time_to_live
        self._replicas: dict[tuple[str, int], tuple[ReplicaInfo, float]] = {}  # with the loop's time of expiry
        self._stopping: frozenset[str] = frozenset()
        self._version = secrets.randbits(48)  # differs from those of a previous process
        self._changed = asyncio.Condition()

    async def secret(self) -> bytes:
        return self._secret

    async def register(self, info: ReplicaInfo) -> None:
        """Add or renew a replica; removes its earlier epochs."""
        async with self._changed:
            expires = asyncio.get_running_loop().time() + self._time_to_live
            stale = [key for key in self._replicas if key[0] == info.replica_id and key != info.key]
            known = self._replicas.get(info.key)
            for key in stale:
                del self._replicas[key]
            self._replicas[info.key] = info, expires
            if known is None:
                logger.info("replica %s of %s is at %s:%d", info.replica_id, info.model_id, info.host, info.port)
                self._stopping -= {info.model_id}
            if stale or known is None or known[0] != info:
                self._announce()

    async def deregister(self, replica_id: str, epoch: int) -> None:
        """Remove a replica; does nothing if it is unknown."""
        async with self._changed:
            if self._replicas.pop((replica_id, epoch), None) is not None:
                logger.info("replica %s deregistered", replica_id)
                self._announce()

    async def stop(self, models: frozenset[str]) -> None:
        """Mark models as stopping: no successor will start."""
        async with self._changed:
            logger.info("models stopping: %s", ", ".join(sorted(models)))
            self._stopping |= models
            self._announce()

    async def watch(self, version: int | None, timeout: float = WATCH_TIMEOUT) -> Membership:  # noqa: ASYNC109 -- a long poll
        """The membership once its version differs from `version`, or after `timeout` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        async with self._changed:
            while True:
                self._expire(loop.time())
                left = deadline - loop.time()
                if version != self._version or left <= 0.0:
                    replicas = tuple(info for info, _ in self._replicas.values())
                    return Membership(self._version, replicas, self._stopping)
                try:
                    async with asyncio.timeout(min(left, _EXPIRY_CHECK)):
                        await self._changed.wait()
                except TimeoutError:
                    continue

    def _expire(self, now: float) -> None:
        expired = [key for key, (_, expires) in self._replicas.items() if expires < now]
        for key in expired:
            logger.warning("replica %s has not registered for %g s", key[0], self._time_to_live)
            del self._replicas[key]
        if expired:
            self._announce()

    def _announce(self) -> None:
        self._version += 1
        self._changed.notify_all()


class DirectoryActor(Directory):
    """The directory as a Ray actor, with its own log."""

    def __init__(self, secret: bytes) -> None:
        log_to_stderr("shoal_directory", logging.INFO)
        super().__init__(secret)


def get_or_create_directory(name: str = DEFAULT_NAME) -> Any:
    """The handle of the cluster's directory, which the first caller creates. Blocks for a round trip to Ray."""
    options = {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "max_restarts": -1,
        "scheduling_strategy": "DEFAULT",  # not in the calling replica's placement group
        "max_concurrency": 10_000,  # each router has one pending watch
    }
    # A restarted actor gets the same secret.
    return create_actor(DirectoryActor, options, new_secret())


def announce_stop(models: frozenset[str], name: str = DEFAULT_NAME) -> None:
    """Notify routers that the models stop, so that queued requests fail at once."""
    directory = named_actor(name, NAMESPACE)
    if directory is None:
        return
    try:
        ray.get(directory.stop.remote(models), timeout=_STOP_TIMEOUT)
    except RayError as error:
        logger.warning("failed to notify routers that the models stop: %s", error)


def remove_directory(name: str = DEFAULT_NAME) -> None:
    """End the directory of a cluster without users."""
    directory = named_actor(name, NAMESPACE)
    if directory is not None:
        kill_actor(directory)


class DirectoryClient:
    """Async client of the directory; a MembershipSource. Every method may raise DirectoryUnavailable."""

    def __init__(self, name: str = DEFAULT_NAME) -> None:
        self._name = name
        self._actor: Any = None

    async def secret(self) -> bytes:
        """The cluster's secret, for Router and ReplicaServer."""
        return await self._call("secret")

    async def register(self, info: ReplicaInfo) -> None:
        await self._call("register", info)

    async def deregister(self, info: ReplicaInfo) -> None:
        await self._call("deregister", info.replica_id, info.epoch)

    async def watch(self, version: int | None) -> Membership:
        return await self._call("watch", version)

    async def _call(self, method: str, *args: object) -> Any:
        try:
            if self._actor is None:
                self._actor = await asyncio.to_thread(get_or_create_directory, self._name)
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                return await getattr(self._actor, method).remote(*args)
        except (RayError, ValueError, OSError) as error:  # TimeoutError is an OSError
            self._actor = None  # the handle may belong to a lost cluster
            raise DirectoryUnavailable(f"the directory {self._name!r} does not answer: {error}") from error
