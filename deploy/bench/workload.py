"""Prompts, lengths, and the function that runs and times them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...replicas.engine.engine import Engine
from ...replicas.offline import generate
from ...replicas.protocol import FinishReason, Request, SamplingParams

# Ids below this are special or bytes in most vocabularies.
_FIRST_TOKEN = 10


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts with their numbers of new tokens; end-of-sequence is ignored."""

    prompts: list[list[int]]
    num_new_tokens: list[int]
    temperature: float = 0.0

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.num_new_tokens)


# Seconds from the first submission to the last token.
Run = Callable[[Workload], float]


def random_prompt(draw: random.Random, length: int, vocab_size: int) -> list[int]:
    return draw.choices(range(min(_FIRST_TOKEN, vocab_size - 1), vocab_size), k=length)


def fixed_lengths(draw: random.Random, batch: int, prompt_len: int, num_new_tokens: int, vocab_size: int) -> Workload:
    """`batch` random prompts of one length."""
    prompts = [random_prompt(draw, prompt_len, vocab_size) for _ in range(batch)]
    return Workload(prompts, [num_new_tokens] * batch)


def mixed_lengths(
    num_requests: int, low: int, high: int, vocab_size: int, *, seed: int = 1, temperature: float = 0.6
) -> Workload:
    """Random prompts with input and output lengths spread evenly over low..high."""
    draw = random.Random(seed)
    lengths = [(draw.randint(low, high), draw.randint(low, high)) for _ in range(num_requests)]
    prompts = [random_prompt(draw, length, vocab_size) for length, _ in lengths]
    return Workload(prompts, [num for _, num in lengths], temperature)


def requests_of(workload: Workload) -> list[Request]:
    """The workload as engine requests."""
    pairs = zip(workload.prompts, workload.num_new_tokens, strict=True)
    return [
        Request(
            str(number),
            tuple(prompt),
            SamplingParams(max_tokens=length, temperature=workload.temperature, ignore_eos=True, seed=number),
        )
        for number, (prompt, length) in enumerate(pairs)
    ]


def engine_run(engine: Engine) -> Run:
    """Run workloads on an engine of this process, and check every sequence's length."""

    def run(workload: Workload) -> float:
        requests = requests_of(workload)
        begin = time.perf_counter()
        completions = generate(engine, requests)
        elapsed = time.perf_counter() - begin
        for request in requests:
            (completion,) = completions[request.request_id]
            if completion.finish_reason != FinishReason.LENGTH:
                raise RuntimeError(f"a sequence ended by {completion.finish_reason}: {completion.error}")
            assert len(completion.token_ids) == request.sampling.max_tokens
        return elapsed

    return run
