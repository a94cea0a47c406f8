"""Replicas of several ranks on the session's Ray, and what is to be seen of them from outside."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from shoal.cluster.ray_private import actor_table
from shoal.cluster.replica.replica import Replica, ReplicaOptions
from shoal.cluster.router.options import RouterOptions
from shoal.cluster.router.router import Router
from shoal.cluster.shards.placement import bundles, ray_actor_options, strategy
from shoal.cluster.wire.directory import DirectoryClient, remove_directory
from shoal.cluster.wire.membership import ReplicaInfo
from shoal.replicas.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig

MODEL = "tiny"
DIRECTORY = "sharded-directory"
_FOLDER = Path(__file__).parents[2] / "deploy" / "models" / "tiny"
_PATIENCE = 180.0  # seconds; only a failing test waits so long
_TITLE = re.compile(r"ray::shard (\d+) of replica (\d+)")


def tiny_config(parallel: ParallelConfig, folder: Path = _FOLDER) -> EngineConfig:
    return EngineConfig(
        ModelConfig(str(folder), max_model_len=512),
        CacheConfig(num_blocks=256),
        SchedulerConfig(max_num_seqs=16),
        parallel=parallel,
        device="cpu",
        num_threads=1,
    )


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(_PATIENCE):
        while not condition():
            await asyncio.sleep(0.02)


@contextmanager
def deployed(config: EngineConfig, num_replicas: int = 1) -> Iterator[None]:
    """So many replicas, on few of the machine's CPUs. Raises RuntimeError with what a replica says if none starts."""
    made = bundles(config.parallel, num_cpus=0.1, num_gpus_per_shard=0)
    deployment: Any = serve.deployment(
        Replica,  # pyright: ignore[reportArgumentType]
        name="replica",
        num_replicas=num_replicas,
        placement_group_bundles=made,
        placement_group_strategy=strategy(config.parallel),
        ray_actor_options=ray_actor_options(made[0]),
        health_check_period_s=1,
        health_check_timeout_s=3,
        max_constructor_retry_count=2,
    )
    options = ReplicaOptions(directory=DIRECTORY, host="127.0.0.1")
    try:
        try:
            serve.run(deployment.bind(MODEL, config, options), name="app", route_prefix=None)
        except RuntimeError as error:
            raise RuntimeError(serve.status().applications["app"].deployments["replica"].message) from error
        yield
    finally:
        serve.shutdown()
        remove_directory(DIRECTORY)


@asynccontextmanager
async def router(num_replicas: int) -> AsyncIterator[Router]:
    """A router that is connected to all replicas."""
    client = DirectoryClient(DIRECTORY)
    made = Router(client, await client.secret(), RouterOptions(replay_timeout=_PATIENCE, queue_timeout=_PATIENCE))
    await made.start()
    try:
        await until(lambda: len(made.replicas(MODEL)) == num_replicas)
        yield made
    finally:
        await made.close()


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one replica, and the sockets that they had."""

    replica: int
    ranks: tuple[int, ...]
    sockets: frozenset[str]

    @staticmethod
    def of(info: ReplicaInfo) -> Processes:
        found = {}
        for folder in _processes():
            title = _TITLE.match(_read(folder / "cmdline"))
            if title is not None and int(title[2]) == info.pid:
                found[int(title[1])] = int(folder.name)
        ranks = tuple(found[rank] for rank in sorted(found))
        return Processes(info.pid, ranks, frozenset().union(*map(_sockets, (info.pid, *ranks))))

    @property
    def left(self) -> list[str]:
        """Those that still run, and sockets that somebody still holds: listening ones, connections, UNIX sockets."""
        folders = [Path(f"/proc/{pid}") for pid in (self.replica, *self.ranks)]
        sockets = [line for inode, line in _open_sockets().items() if inode in self.sockets]
        return [_read(folder / "cmdline") for folder in folders if _runs(folder)] + sockets


def placement_groups() -> int:
    """Those that hold resources, or wait for them."""
    return sum(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values())


def shard_actors() -> int:
    """Those that Ray does not count as dead."""
    return sum(actor["ActorClassName"] == "ShardActor" and actor["State"] != "DEAD" for actor in actor_table())


def shared_memory() -> set[str]:
    """Segments that torch or NCCL has made, on this machine."""
    return {file.name for file in Path("/dev/shm").iterdir() if file.name.startswith(("nccl", "torch"))}


def shard_processes() -> list[str]:
    """All shard actors of this machine, whatever their state; their titles."""
    titles = [_read(folder / "cmdline") for folder in _processes() if _runs(folder)]
    return [title for title in titles if re.match(r"ray::(shard |ShardActor)", title)]


def _processes() -> list[Path]:
    return [folder for folder in Path("/proc").iterdir() if folder.name.isdecimal()]


def _sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.update(re.findall(r"^socket:\[(\d+)\]$", str(descriptor.readlink())))
    return found


def _open_sockets() -> dict[str, str]:
    """The kernel's line of every socket that a process holds, by inode."""
    found = {}
    for table, column in (("tcp", 9), ("tcp6", 9), ("unix", 6)):
        for line in _read(Path("/proc/net") / table).splitlines()[1:]:
            found[line.split()[column]] = f"{table} {line}"
    return found


def _runs(folder: Path) -> bool:
    return _read(folder / "stat").rpartition(")")[2].split()[:1] not in ([], ["Z"])


def _read(path: Path) -> str:
    try:
        return path.read_text().rstrip("\0")
    except OSError:  # the process has just ended
        return ""
