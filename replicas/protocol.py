"""What crosses the boundary of an engine: requests in, token deltas out.

Frozen and of the standard library alone, so that routers speak it without loading torch and msgspec can put it on
the wire as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

SEED_BITS = 64
# Bounds of the counts in StepTimes: a step of a GPU takes milliseconds, one of a CPU tens of them, and chunks more.
STEP_SECONDS = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.075, 0.1, 0.2, 0.5, 1.0, 5.0),
)


class FinishReason(StrEnum):
    """Why a sequence ended. STOP: end-of-sequence, stop token or stop string. LENGTH: max_tokens or the context."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen. Every default is neutral, and `temperature=0` is greedy.

    Order of application: logit_bias, allowed_token_ids, bad_words and min_tokens, then penalties, temperature,
    min_p, top_k, top_p. Log-probabilities are those of the model's own logits, before all of these.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps every token
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    seed: int = 0  # unsigned, SEED_BITS wide; the router draws one for a request that names none
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives returned beside the sampled token; None returns nothing
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_history(self) -> bool:
        """Whether the sampler must know the tokens that came before."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0 or self.bad_words)


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and the sequences wanted of it.

    `num_samples` sequences are forked from the prompt; they are numbered from `first_sample`, and sample i draws its
    noise with `sample_seed(i)`. `emitted_token_ids` are tokens of an earlier life of this request that its client
    already has: they are run as context, counted as output, and not sent again (num_samples is 1 then).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    num_samples: int = 1
    first_sample: int = 0
    emitted_token_ids: tuple[int, ...] = ()
    priority: int = 0  # lower runs first; ties by arrival
    cache_salt: str = ""  # prefixes are shared only between requests of equal salt

    def sample_seed(self, sample: int) -> int:
        """The seed of sample `sample`: distinct per sample, and sample 0 has the request's own."""
        return (self.sampling.seed + sample) % (1 << SEED_BITS)


class Logprob(NamedTuple):
    """Log-probability of one token, its rank (1 is the likeliest), and the top alternatives as (id, logprob)."""

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


class TokenDelta(NamedTuple):
    """New tokens of one sequence. The last delta of a sequence, and only that one, has a `finish_reason`.

    `stop_reason` is the stop token's id (None at end-of-sequence) or the stop string. `prompt_logprobs` comes once,
    with the first delta of sample `first_sample`; its first entry is None. `error` explains FinishReason.ERROR.
    """

    request_id: str
    sample: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0  # prompt tokens served by the prefix cache; set on a sample's first delta
    prompt_logprobs: tuple[Logprob | None, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BlockReport:
    """How a request's sequences, or all of an engine, hold KV blocks. Counts are of blocks.

    shared: distinct blocks held by two or more sequences; private: held by one; copied: copy-on-write copies made.
    """

    shared: int
    private: int
    copied: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """How long an engine's steps have taken since its start.

    A step lasts from the end of the one before it, or from its own beginning where nothing ran, to the arrival of its
    tokens. `counts[i]` is of steps of at most STEP_SECONDS[i] seconds and more than the bound before; the last count
    has no bound. `seconds` is their sum.
    """

    counts: tuple[int, ...] = (0,) * (len(STEP_SECONDS) + 1)
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """What a replica tells its routers about itself, for placement and for /metrics."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0  # uncached or evictable: what a new request can be given
    num_cached_blocks: int = 0  # of the free ones, those that hold a reusable prefix
    block_size: int = 16
    blocks: BlockReport = BlockReport(0, 0, 0)
    prefix_cache_queries: int = 0  # prompt tokens looked up, since start
    prefix_cache_hits: int = 0  # prompt tokens found, since start
    num_preemptions: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0  # computed or reused, since start
    generation_tokens: int = 0
    step_times: StepTimes = StepTimes()  # where the engine runs in a thread of its own
