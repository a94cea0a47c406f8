"""A router with no replicas behind it: it makes tokens up, one a step, and keeps what it was asked.

Sample `s` of a request continues a fixed text, starting at its `s`-th word, so that tests can say what must come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from shoal.cluster.router.metrics import RouterCollector
from shoal.cluster.router.routed_request import RequestTimes
from shoal.cluster.wire.errors import NoReplica
from shoal.cluster.wire.membership import ReplicaInfo
from shoal.replicas.errors import RequestError
from shoal.replicas.protocol import FinishReason, Logprob, ReplicaLoad, Request, TokenDelta
from shoal.replicas.text.tokenizer import Tokenizer

STORY = "the quick brown fox — näïve 🐟 fish — jumps over the lazy dog; "


class FakeRouter:
    """Answers as cluster.router.Router does. `gate` holds every token back until it is set."""

    def __init__(self, tokenizer: Tokenizer, model: str = "fake", *, max_model_len: int = 256) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.ended: list[tuple[str, int]] = []  # samples that the reader ended early
        self.num_streams = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_at: int | None = None  # the step at which every sample fails
        self.refuse: Exception | None = None  # raised before the first item
        self.up = True
        self.collector = RouterCollector(list)
        self.load = ReplicaLoad(num_blocks=64, num_free_blocks=64)
        self.info = ReplicaInfo(
            "fake-0", model, "127.0.0.1", 1, max_model_len=max_model_len, vocab_size=tokenizer.vocab_size, num_blocks=64
        )

    def replicas(self, model: str) -> list[tuple[ReplicaInfo, ReplicaLoad]]:
        assert model == self.model
        return [(self.info, self.load)] if self.up else []

    def end_sample(self, request_id: str, sample: int) -> None:
        self.ended.append((request_id, sample))

    async def block_reports(self, model: str) -> list[dict[str, Any]]:
        return [{"replica_id": "fake-0", "blocks": {"shared": 0, "private": 0, "copied": 0}, "requests": {}}]

    async def reset_prefix_cache(self, model: str) -> bool:
        return True

    def output(self, request: Request, sample: int = 0) -> list[int]:
        """Everything that a sample generates."""
        words = STORY.split(" ")
        text = " ".join(words[sample % len(words) :]) + STORY * 64
        return self.tokenizer.encode(text, add_special_tokens=False)[: request.sampling.max_tokens]

    async def generate(
        self, model: str, request: Request, *, times: RequestTimes | None = None
    ) -> AsyncGenerator[list[TokenDelta], None]:
        if not self.up:
            raise NoReplica("none is up", retry_after=2.5)
        if self.refuse is not None:
            raise self.refuse
        if request.sampling.max_tokens > 250:
            raise RequestError("too much", param="max_tokens")
        self.requests.append(request)
        times = times or RequestTimes()
        times.arrived = times.dispatched = times.first_token = times.finished = asyncio.get_running_loop().time()
        outputs = [self.output(request, sample) for sample in range(request.num_samples)]
        self.num_streams += 1
        done = False
        try:
            for step in range(max(map(len, outputs))):
                await self.gate.wait()
                await asyncio.sleep(0)
                if step == self.fail_at:
                    ids = range(request.num_samples)
                    yield [
                        TokenDelta(request.request_id, i, finish_reason=FinishReason.ERROR, error="boom") for i in ids
                    ]
                    done = True
                    return
                yield [self._delta(request, i, step, ids) for i, ids in enumerate(outputs)]
            done = True
        finally:
            self.num_streams -= 1
            if not done:
                self.aborted.append(request.request_id)

    @staticmethod
    def _failure(request: Request, sample: int) -> TokenDelta:
        return TokenDelta(request.request_id, sample, finish_reason=FinishReason.ERROR, error="boom")

    def _delta(self, request: Request, sample: int, step: int, output: list[int]) -> TokenDelta:
        token = output[step]
        sampling = request.sampling
        stopped = token in sampling.stop_token_ids and step >= sampling.min_tokens
        last = step == len(output) - 1
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH if last else None
        return TokenDelta(
            request.request_id,
            sample,
            (token,),
            (self._logprob(token, sample, sampling.logprobs),) if sampling.logprobs is not None else None,
            reason,
            token if stopped else None,
            num_cached_tokens=len(request.prompt_token_ids) // 16 * 16 if step == 0 else 0,
            prompt_logprobs=self._prompt_logprobs(request) if step == 0 and sample == 0 else None,
        )

    def _prompt_logprobs(self, request: Request) -> tuple[Logprob | None, ...] | None:
        num = request.sampling.prompt_logprobs
        if num is None:
            return None
        return (None, *[self._logprob(token, 0, num) for token in request.prompt_token_ids[1:]])

    def _logprob(self, token: int, sample: int, num: int) -> Logprob:
        """Sample i has log-probability -(i % 3) - 0.5 for every token; the token itself is the most probable."""
        own = -(sample % 3) - 0.5
        others = [(i, own - 1.0 - i) for i in range(num) if i != token]
        return Logprob(token, own, 1, ((token, own), *others)[:num])
