"""`shoal bench serve`: any OpenAI-compatible server, with random prompts of one length."""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import Any

from ...replicas.errors import ServingError
from .http_client import Answer, Target, closed_loop, complete, open_loop
from .serving_metrics import NO_OBJECTIVES, Objectives, figures, poisson_offsets
from .workload import random_prompt


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of every request, and the ids its prompt is drawn from."""

    num_prompt_tokens: int = 512
    num_new_tokens: int = 128
    vocab_size: int = 1000


def measure(
    target: Target,
    shape: Shape,
    num_requests: int,
    *,
    concurrency: int | None = None,
    rate: float | None = None,
    objectives: Objectives = NO_OBJECTIVES,
    seed: int = 0,
) -> dict[str, Any]:
    """One row: `concurrency` parallel requests, or Poisson arrivals of `rate` a second.

    Raises ServingError if no request is answered, or one has another length.
    """
    assert (concurrency is None) != (rate is None), "a closed loop or an open one"
    draw = random.Random(seed)
    prompts = (random_prompt(draw, shape.num_prompt_tokens, shape.vocab_size) for _ in range(num_requests))
    requests = [target.completion(prompt, shape.num_new_tokens) for prompt in prompts]
    send = partial(complete, target)
    cpu = time.process_time()
    if concurrency is not None:
        answers = asyncio.run(closed_loop(send, requests, concurrency))
    else:
        assert rate is not None
        answers = asyncio.run(open_loop(send, requests, poisson_offsets(rate, num_requests, seed)))
    cpu = time.process_time() - cpu
    _check(answers, shape)
    row = figures(answers, objectives)
    load = {"load": f"c={concurrency}" if concurrency is not None else f"{rate:g} req/s"}
    # Near 100 the client itself is the bottleneck.
    return load | row | {"client CPU %": 100 * cpu / row["seconds"]}


def _check(answers: list[Answer], shape: Shape) -> None:
    whole = [answer for answer in answers if answer.error is None]
    if not whole:
        raise ServingError(f"none of {len(answers)} requests was answered; the first: {answers[0].error}")
    for answer in whole:
        if answer.num_tokens != shape.num_new_tokens:
            raise ServingError(f"an answer has {answer.num_tokens} tokens where {shape.num_new_tokens} were asked for")


def warm_up(target: Target, shape: Shape, num_requests: int = 8) -> None:
    """Run some untimed requests."""
    draw = random.Random(-1)
    prompts = (random_prompt(draw, shape.num_prompt_tokens, shape.vocab_size) for _ in range(num_requests))
    requests = [target.completion(prompt, shape.num_new_tokens) for prompt in prompts]
    _check(asyncio.run(closed_loop(partial(complete, target), requests, num_requests)), shape)


def first_model(url: str, api_key: str | None = None) -> str:
    """The first model that a server lists. Raises ServingError."""
    request = urllib.request.Request(f"{url.rstrip('/')}/v1/models")
    if api_key is not None:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["data"][0]["id"]
    except (urllib.error.URLError, OSError, ValueError, LookupError) as error:
        raise ServingError(f"{url} does not name its models ({error}); is a server there? Else give --model") from error
