"""A scheduler's counters, and its load report."""

from __future__ import annotations

from dataclasses import dataclass

from ..protocol import ReplicaLoad
from .block_pool import BlockPool


@dataclass(slots=True)
class Counters:
    """Counts since the scheduler's start."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    cache_queries: int = 0
    cache_hits: int = 0

    def load(self, pool: BlockPool, *, num_running: int, num_waiting: int) -> ReplicaLoad:
        """The load report for placement and metrics."""
        return ReplicaLoad(
            num_running=num_running,
            num_waiting=num_waiting,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            block_size=pool.block_size,
            blocks=pool.report(),
            prefix_cache_queries=self.cache_queries,
            prefix_cache_hits=self.cache_hits,
            num_preemptions=self.preemptions,
            num_steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
        )
