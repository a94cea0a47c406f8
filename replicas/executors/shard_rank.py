"""A rank of a shard group, in its own process.

rank = ShardRank(config, rank, local_rank)       config: resolved, the same for every rank
rank.open_store(host)                            rank 0 only; its result goes to every rank
rank.join(store, timeout_s)
rank.load()
rank.serve(address, token)                       until the last plan

Local processes (shard_processes.py) and Ray actors call these in order. A rank that loses its engine
or another rank exits: a collective with a lost peer may wait forever.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import timedelta
from functools import partial
from itertools import count

import torch

from ..channel.step_channel import StepChannelClient
from ..channel.step_sockets import Address
from ..config import ResolvedConfig
from ..errors import ShardGroupError
from ..parallel.c10d import Store, TCPStore
from ..parallel.collectives import TorchCollectives
from ..parallel.comm import ParallelContext
from ..parallel.pipeline import PipelineLinks
from ..parallel.process_groups import ProcessGroups, local_host, open_store
from ..parallel.symmetric import Group, open_collectives
from ..worker.shard import Shard
from .group_start import Loaded
from .plan_loop import run_plans
from .rank_facts import RankFacts, check_facts

logger = logging.getLogger(__name__)

EXIT_GROUP_LOST = 71
_LEAVE_SECONDS = 3.0  # to finish received plans after the engine hung up
_ABORT_SECONDS = 2.0  # NCCL's abort may hang too
_LOAD_TIMEOUT = timedelta(hours=2)  # GroupStart has a shorter limit


class ShardRank:
    """Rank `rank` = pp_rank * tp_size + tp_rank of a model copy, on the CPU or cuda:{local_rank}."""

    def __init__(self, config: ResolvedConfig, rank: int, local_rank: int) -> None:
        self._config, self._rank = config, rank
        self._world_size = config.parallel.world_size
        self._pp_rank, self._tp_rank = divmod(rank, config.parallel.tensor_parallel_size)
        self._device = torch.device("cuda", local_rank) if config.device == "cuda" else torch.device("cpu")
        self._store: Store | None = None
        self._groups: ProcessGroups | None = None
        self._context = ParallelContext()
        self._num_neighbours = 1  # on this node, including itself
        self._shard: Shard | None = None
        self._agreements = count()
        self._left = threading.Event()

    def open_store(self, host: str) -> tuple[str, int]:
        """Open the group's store on this machine; returns its address."""
        self._store, port = open_store(host)
        return host, port

    def join(self, store: tuple[str, int], timeout_s: float) -> None:
        """Join the process group.

        Raises ShardGroupError if a rank does not join within `timeout_s`, or its facts
        differ.
        """
        begin = time.monotonic()
        deadline = begin + timeout_s
        try:
            host = local_host(store)
            if self._store is None:
                self._store = TCPStore(*store, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        except (OSError, RuntimeError) as error:
            raise ShardGroupError(
                f"rank {self._rank} cannot reach the group's store at {store}: {error}; nodes of a group must reach "
                "each other at every port: look at routes and firewalls"
            ) from error
        if self._device.type == "cuda":
            if (found := torch.cuda.device_count()) <= self._device.index:
                raise ShardGroupError(
                    f"rank {self._rank} is to use {self._device}, and its process sees {found} GPUs; check "
                    "CUDA_VISIBLE_DEVICES, and whether the driver still has them all (nvidia-smi -L)"
                )
            torch.cuda.set_device(self._device)
        own = RankFacts.of(self._config, self._device)
        answers = self._exchange("facts", own.to_json(), timedelta(seconds=max(0.1, deadline - time.monotonic())))
        facts = [RankFacts.from_json(answer) for answer in answers]
        check_facts(facts)
        self._num_neighbours = sum(other.node == own.node for other in facts)
        self._groups = ProcessGroups(self._store, self._rank, self._device, host)
        met_s = time.monotonic() - begin
        self._context = self._make_context(self._groups)
        connected_s = time.monotonic() - begin - met_s
        logger.info(
            "rank %d of %d joined the process group in %.1f s and connected in %.1f s",
            self._rank, self._world_size, met_s, connected_s,
        )  # fmt: skip

    def _make_context(self, groups: ProcessGroups) -> ParallelContext:
        parallel = self._config.parallel
        tp_size, pp_size = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        tp = None
        if tp_size > 1:
            first = self._pp_rank * tp_size
            name = f"stage {self._pp_rank}"
            plain = TorchCollectives(groups.open(name, range(first, first + tp_size)))
            assert self._store is not None
            group = Group(self._store, name, self._tp_rank, tp_size, self._device)
            tp = open_collectives(
                plain,
                group,
                parallel.all_reduce,
                quantized=parallel.quantized_all_reduce,
                batch_invariant=self._config.batch_invariant,
            )
        pp, max_in_flight = None, self._config.scheduler.max_steps_in_flight
        if pp_size > 1:
            pp = PipelineLinks.connect(
                partial(groups.open, connect=False),  # connects at the first transfer, as NCCL requires of pairs
                self._device,
                rank=self._rank,
                tp_size=tp_size,
                pp_size=pp_size,
                max_in_flight=max_in_flight,
            )
        return ParallelContext(self._tp_rank, tp_size, self._pp_rank, pp_size, tp, pp)

    def load(self) -> Loaded:
        """Load this rank's part, and agree on the number of KV blocks. Raises ModelError
        and ConfigError as Shard does.
        """
        self._shard = Shard(
            self._config, self._context, self._device, agree=self._agree_on_least, num_neighbours=self._num_neighbours
        )
        return Loaded(self._shard.num_blocks, self._shard.startup_seconds)

    def serve(self, address: Address, token: bytes) -> None:
        """Run plans until the engine closes its step channel at `address`.

        Raises EngineError if the engine is unreachable. A later loss ends the process.
        """
        assert self._shard is not None, "load() comes first"
        client = StepChannelClient(address, self._rank, self._world_size, token)
        threading.Thread(target=self._watch_engine, args=(client,), name="shoal-engine-watch", daemon=True).start()
        last_stage = self._context.is_last_stage
        try:
            run_plans(client, self._shard, self._context.check, answers=last_stage and self._tp_rank == 0)
            self._shard.synchronize()
        except Exception as error:
            self._leave(f"{type(error).__name__}: {error}")
        self._left.set()
        client.close()

    def abort(self) -> None:
        """Abort the process groups, even in a collective. Destroying them may block."""
        if self._groups is not None:
            self._groups.abort()

    def _watch_engine(self, client: StepChannelClient) -> None:
        """Exit if the engine is gone while the main thread waits for a lost rank."""
        client.wait_for_hang_up()
        if not self._left.wait(_LEAVE_SECONDS):
            self._leave(f"the engine hung up {_LEAVE_SECONDS:g} s ago, and this rank still waits for another one")

    def _leave(self, why: str) -> None:
        logger.error("rank %d of %d exits: %s", self._rank, self._world_size, why)
        aborting = threading.Thread(target=self.abort, daemon=True)
        aborting.start()
        aborting.join(_ABORT_SECONDS)
        os._exit(EXIT_GROUP_LOST)

    def _agree_on_least(self, value: int) -> int:
        """Return the minimum over ranks; every rank calls it equally often."""
        answers = self._exchange(f"agreement {next(self._agreements)}", str(value), _LOAD_TIMEOUT)
        return min(int(answer) for answer in answers)

    def _exchange(self, what: str, value: str, timeout: timedelta) -> list[bytes]:
        """Every rank's value. Raises ShardGroupError with the missing ranks after `timeout`."""
        assert self._store is not None
        keys = [f"{what} of {rank}" for rank in range(self._world_size)]
        begin = time.monotonic()
        try:
            self._store.set(keys[self._rank], value)
            self._store.wait(keys, timeout)
            return [self._store.get(key) for key in keys]
        except RuntimeError as error:  # torch's store and network errors
            missing = self._missing(keys)
            raise ShardGroupError(
                f"rank {self._rank} has waited {time.monotonic() - begin:.1f} s for the {what} of ranks {missing} of "
                f"{self._world_size} ({type(error).__name__}); look at their logs"
            ) from error

    def _missing(self, keys: list[str]) -> list[int] | str:
        assert self._store is not None
        try:
            return [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        except RuntimeError:
            return "(unknown: the store is gone with rank 0)"
