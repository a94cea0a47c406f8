"""Replay log: the prompt and emitted tokens with which another replica continues a request.

Sampling noise is a function of (seed, position), so the continuation has the lost replica's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...replicas.protocol import FinishReason, Request, TokenDelta
from ..wire.frames import StreamDelta


@dataclass(eq=False, slots=True)
class _Sample:
    emitted: list[int] = field(default_factory=list)
    started: bool = False
    open: bool = True


class ReplayLog:
    """The output of one request so far, per sample."""

    __slots__ = ("_samples", "num_open", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self._samples = {sample: _Sample() for sample in self.samples}
        self.num_open = request.num_samples

    @property
    def samples(self) -> range:
        first = self.request.first_sample
        return range(first, first + self.request.num_samples)

    def record(self, delta: StreamDelta) -> TokenDelta | None:
        """The delta for the client; None if its sample has ended or does not exist."""
        sample = self._samples.get(delta.sample)
        if sample is None or not sample.open:
            return None
        sample.emitted += delta.token_ids
        if delta.finish_reason is not None:
            sample.open = False
            self.num_open -= 1
        # A replay must not repeat the fields of a sample's first delta.
        first, sample.started = not sample.started, True
        return TokenDelta(
            self.request.request_id,
            delta.sample,
            delta.token_ids,
            delta.logprobs,
            delta.finish_reason,
            delta.stop_reason,
            delta.num_cached_tokens if first else 0,
            delta.prompt_logprobs if first else None,
            delta.error,
        )

    def finish(self, samples: Iterable[int], reason: FinishReason, error: str | None = None) -> list[TokenDelta]:
        """Terminal deltas of the open ones among `samples`."""
        deltas: list[TokenDelta] = []
        for index in samples:
            sample = self._samples[index]
            if sample.open:
                sample.open = False
                self.num_open -= 1
                deltas.append(TokenDelta(self.request.request_id, index, finish_reason=reason, error=error))
        return deltas

    def complete(self, samples: Iterable[int]) -> list[TokenDelta]:
        """Terminal deltas of samples that had reached max_tokens, and lost only their final delta with the replica."""
        limit = self.request.sampling.max_tokens
        full = [i for i in samples if self._num_output(i) >= limit]
        return self.finish(full, FinishReason.LENGTH)

    def remaining(self, samples: range) -> list[Request]:
        """Requests that produce the missing tokens of `samples`.

        One request that shares the prefill if no sample has started; otherwise one per sample.
        """
        request = self.request
        if all(self._samples[i].open and not self._samples[i].started for i in samples):
            whole = replace(request, first_sample=samples.start, num_samples=len(samples))
            return [whole if samples.start == request.first_sample else _without_prompt_logprobs(whole)]
        requests: list[Request] = []
        for index in samples:
            sample = self._samples[index]
            if not sample.open:
                continue
            one = replace(
                request,
                num_samples=1,
                first_sample=index,
                emitted_token_ids=(*request.emitted_token_ids, *sample.emitted),
            )
            if sample.started or index != request.first_sample:
                one = _without_prompt_logprobs(one)
            requests.append(one)
        return requests

    def _num_output(self, sample: int) -> int:
        return len(self.request.emitted_token_ids) + len(self._samples[sample].emitted)


def _without_prompt_logprobs(request: Request) -> Request:
    return replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
