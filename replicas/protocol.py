"""An engine's interface: requests in, token deltas out.

Standard library only: routers need no torch, and msgspec encodes the types as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, NamedTuple

SEED_BITS = 64
# Ranks keep sampling parameters as float32 and int32.
_MAX_FLOAT = 3.4e38
_MAX_INT = (1 << 31) - 1
# Histogram bounds of StepTimes.
STEP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.2, 0.5, 1.0, 5.0),
)


class FinishReason(StrEnum):
    """Why a sequence ended. STOP: end-of-sequence, stop token or string. LENGTH: max_tokens or context."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Bounds(NamedTuple):
    """Inclusive bounds; `ModelLimits` checks them."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request. `temperature=0` is greedy.

    Order: logit_bias, allowed_token_ids, bad_words, min_tokens, then penalties, temperature,
    min_p, top_k, top_p. Logprobs are of the model's own logits, before all of these.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: Annotated[float, Bounds(0.0, _MAX_FLOAT)] = 1.0
    top_p: Annotated[float, Bounds(0.0, 1.0)] = 1.0  # above 0
    top_k: Annotated[int, Bounds(0, _MAX_INT)] = 0  # 0 keeps every token
    min_p: Annotated[float, Bounds(0.0, 1.0)] = 0.0
    presence_penalty: Annotated[float, Bounds(-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, Bounds(-2.0, 2.0)] = 0.0
    repetition_penalty: Annotated[float, Bounds(0.01, 100.0)] = 1.0  # beyond, logits overflow in float32
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: Annotated[int, Bounds(0, (1 << SEED_BITS) - 1)] = 0  # default: drawn by the router
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives beside the sampled token; None: no logprobs
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0

    @property
    def uses_history(self) -> bool:
        """Whether sampling depends on earlier tokens."""
        return self.has_penalties or bool(self.bad_words)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and its samples.

    `num_samples` sequences fork from the prompt, numbered from `first_sample`.
    `emitted_token_ids` are output of an earlier run and are not sent again; num_samples is then
    1.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    first_sample: int = 0
    emitted_token_ids: tuple[int, ...] = ()
    priority: int = 0  # lower runs first; ties by arrival
    cache_salt: str = ""  # requests share prefixes only under an equal salt

    def sample_seed(self, sample: int) -> int:
        """A distinct seed per sample; sample 0 has the request's own."""
        return (self.sampling.seed + sample) % (1 << SEED_BITS)


class Logprob(NamedTuple):
    """Logprob of one token, its rank (1: most probable), and the top-k as (id, logprob)."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenDelta(NamedTuple):
    """New tokens of one sequence. Only its last delta has a `finish_reason`.

    `stop_reason`: stop token's id (None at end-of-sequence) or stop string. `prompt_logprobs`
    comes once, with the first delta of sample `first_sample`; its first entry is None. `error`
    explains FinishReason.ERROR.
    """

    request_id: str
    sample: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0  # prompt tokens from the prefix cache; on a sample's first delta
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BlockReport:
    """KV blocks of a request or an engine.

    shared: held by two or more sequences; private: by one; copied: copies on write.
    """

    shared: int
    private: int
    copied: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Durations of an engine's steps since its start.

    A step lasts from the end of the previous step, or from its own start if idle, until its
    tokens arrive. `counts[i]`: steps of at most STEP_SECONDS[i] seconds and above the bound
    before; the last has no bound. `seconds`: their sum.
    """

    counts: tuple[int, ...] = (0,) * (len(STEP_SECONDS) + 1)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """A replica's report to its routers, for placement and /metrics."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # uncached or evictable
    num_cached_blocks: int = 0  # free blocks that hold a reusable prefix
    block_size: int = 16
    blocks: BlockReport = BlockReport(0, 0, 0)
    prefix_cache_queries: int = 0  # prompt tokens looked up, since start
    prefix_cache_hits: int = 0  # prompt tokens found, since start
    num_preemptions: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0  # computed or reused, since start
    generation_tokens: int = 0
    step_times: StepTimes = StepTimes()  # of an EngineThread
