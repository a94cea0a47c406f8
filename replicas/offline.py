"""The offline entry: an engine from a configuration, completions from a batch of requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .config import EngineConfig, ResolvedConfig
from .engine.engine import Engine
from .errors import EngineError
from .executor import Executor
from .models.checkpoint import read_model_facts
from .protocol import FinishReason, Logprob, Request, TokenDelta


@dataclass(slots=True)
class Completion:
    """All deltas of one sequence, joined."""

    request_id: str
    sample: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    def append(self, delta: TokenDelta) -> None:
        """Join one more delta of this sequence."""
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.num_cached_tokens += delta.num_cached_tokens
        self.finish_reason, self.stop_reason, self.error = delta.finish_reason, delta.stop_reason, delta.error


def build_engine(
    config: EngineConfig, *, device: str | None = None, start: Callable[[ResolvedConfig], Executor] | None = None
) -> Engine:
    """Read the checkpoint's facts, resolve the configuration, and start an engine.

    The model loads in this process, or in processes on this machine if it has several ranks. start:
    another way to make the executor; device then names the ranks' device if this process cannot see
    it. Raises ConfigError or ModelError, with the file or the field at fault, and ShardGroupError.
    """
    from .device import choose_device  # loads torch

    facts = read_model_facts(Path(config.model.path))
    resolved = config.resolve(facts, device or choose_device(config.device))
    return Engine(resolved, facts, (start or _start_here)(resolved))


def _start_here(config: ResolvedConfig) -> Executor:
    if config.parallel.world_size == 1:
        from .executors.local_executor import LocalExecutor

        return LocalExecutor(config)
    from .executors.shard_processes import start_shard_processes

    return start_shard_processes(config)


def generate(engine: Engine, requests: Iterable[Request]) -> dict[str, list[Completion]]:
    """Run requests to their ends; the completions of each request id, ordered by sample.

    Raises RequestError for the first invalid request, before any runs, and EngineError if the
    engine fails.
    """
    requests = list(requests)
    for request in requests:
        engine.limits.check(request)
    completions: dict[str, list[Completion]] = {}
    for request in requests:
        engine.add_checked(request)
        samples = range(request.first_sample, request.first_sample + request.num_samples)
        completions[request.request_id] = [Completion(request.request_id, sample) for sample in samples]
    first_samples = {request.request_id: request.first_sample for request in requests}
    deltas: list[TokenDelta] = []
    while deltas or engine.has_work:
        engine.submit()
        for delta in deltas:  # of the previous step, while the device runs the next
            completions[delta.request_id][delta.sample - first_samples[delta.request_id]].append(delta)
        deltas = engine.collect()
    if engine.failure is not None:
        raise EngineError(f"the engine failed: {engine.failure}") from engine.failure
    return completions
