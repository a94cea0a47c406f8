"""A replica without a model: the product's own server over an engine that makes tokens up.

A token depends only on the sample's seed and its position, as in the real engine. So a replayed stream can be compared
with an undisturbed one. A test takes steps by hand (`step`), or they run every `interval`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from shoal.cluster.replica.replica_server import ReplicaServer, ServerOptions
from shoal.cluster.wire.membership import ReplicaInfo
from shoal.replicas.errors import PromptTooLong, RequestError
from shoal.replicas.protocol import BlockReport, FinishReason, Logprob, ReplicaLoad, Request, TokenDelta

VOCAB_SIZE = 1000


def fake_token(request: Request, sample: int, position: int) -> int:
    """The token at `position` of the output of one sample."""
    return (request.sample_seed(sample) * 31 + position * 7 + sum(request.prompt_token_ids)) % VOCAB_SIZE


def fake_output(request: Request, sample: int = 0) -> tuple[int, ...]:
    """All that a fake replica generates for one sample."""
    return tuple(fake_token(request, sample, i) for i in range(request.sampling.max_tokens))


class FakeEngine:
    """Runs up to `max_num_seqs` samples, one token of each a step; the others wait in order of arrival.

    As of the real engine, the terminal deltas of an aborted request come with the next step, and its id is in use
    until then.
    """

    def __init__(
        self,
        publish: Callable[[list[TokenDelta]], None],
        *,
        max_num_seqs: int = 256,
        max_model_len: int = 4096,
        num_blocks: int = 4096,
        block_size: int = 16,
    ) -> None:
        self.requests: list[Request] = []  # every one that was submitted
        self.aborted: list[str] = []
        self.batches: list[int] = []  # sequences of every step
        self._publish = publish
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._output: dict[tuple[str, int], list[int]] = {}
        self._open: dict[tuple[str, int], Request] = {}
        self._undelivered: list[TokenDelta] = []  # terminal deltas of aborted samples
        self._num_steps = 0

    def submit(self, request: Request) -> None:
        length = len(request.prompt_token_ids) + request.sampling.max_tokens
        if length > self._max_model_len:
            raise PromptTooLong(f"{length} tokens are above the context of {self._max_model_len}")
        if any(delta.request_id == request.request_id for delta in self._undelivered):
            raise RequestError(f"request id {request.request_id!r} is in use")
        self.requests.append(request)
        for sample in range(request.first_sample, request.first_sample + request.num_samples):
            self._open[request.request_id, sample] = request
            self._output[request.request_id, sample] = list(request.emitted_token_ids)

    def abort(self, request_id: str, sample: int | None = None) -> None:
        self.aborted.append(request_id if sample is None else f"{request_id}/{sample}")
        for key in [key for key in self._open if key[0] == request_id and sample in (None, key[1])]:
            del self._open[key]
            self._undelivered.append(TokenDelta(*key, finish_reason=FinishReason.ABORT))

    def step(self) -> int:
        """One token for every running sample; returns their number."""
        running = list(self._open.items())[: self._max_num_seqs]
        deltas, self._undelivered = self._undelivered, []
        deltas += [self._advance(request_id, sample, request) for (request_id, sample), request in running]
        self._num_steps += 1
        self.batches.append(len(running))
        if deltas:
            self._publish(deltas)
        return len(running)

    def _advance(self, request_id: str, sample: int, request: Request) -> TokenDelta:
        output = self._output[request_id, sample]
        token = fake_token(request, sample, len(output))
        first = len(output) == len(request.emitted_token_ids)
        output.append(token)
        done = len(output) >= request.sampling.max_tokens
        if done:
            del self._open[request_id, sample]
        logprobs = None
        if request.sampling.logprobs is not None:
            logprobs = (Logprob(token, -0.5, 1, ((token, -0.5),)),)
        return TokenDelta(
            request_id,
            sample,
            (token,),
            logprobs,
            FinishReason.LENGTH if done else None,
            num_cached_tokens=16 if first else 0,
        )

    def load(self) -> ReplicaLoad:
        running = min(len(self._open), self._max_num_seqs)
        used = sum(-(-len(request.prompt_token_ids) // self._block_size) + 1 for request in self._open.values())
        return ReplicaLoad(
            num_running=running,
            num_waiting=len(self._open) - running,
            num_blocks=self._num_blocks,
            num_free_blocks=max(self._num_blocks - used, 0),
            block_size=self._block_size,
            num_steps=self._num_steps,
        )

    def call(self, function: Callable[[Any], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(self))
        return future

    def block_reports(self) -> dict[str, BlockReport]:
        return {request.request_id: BlockReport(2, 1, 0) for request in self._open.values()}

    def reset_prefix_cache(self) -> bool:
        return not self._open


class FakeReplica:
    """A server and its fake engine, on a free port of the loopback interface."""

    def __init__(
        self,
        secret: bytes,
        *,
        model_id: str = "fake",
        replica_id: str = "fake-0",
        interval: float | None = None,
        server_options: ServerOptions | None = None,
        **engine_options: int,
    ) -> None:
        info = ReplicaInfo(
            replica_id,
            model_id,
            "127.0.0.1",
            0,
            epoch=random.getrandbits(32),
            max_model_len=engine_options.get("max_model_len", 4096),
            vocab_size=VOCAB_SIZE,
            num_blocks=engine_options.get("num_blocks", 4096),
            block_size=engine_options.get("block_size", 16),
            max_num_seqs=engine_options.get("max_num_seqs", 256),
            dtype="float32",
        )
        self.server = ReplicaServer(info, secret, server_options)
        self.engine = FakeEngine(self.server.publish, **engine_options)
        self._interval = interval
        self._ticker: asyncio.Task[None] | None = None

    @property
    def info(self) -> ReplicaInfo:
        return self.server.info

    async def start(self) -> ReplicaInfo:
        await self.server.start(self.engine)
        if self._interval is not None:
            self._ticker = asyncio.create_task(self._tick(self._interval))
        return self.info

    async def _tick(self, interval: float) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += interval
            await asyncio.sleep(max(due - loop.time(), 0.0))
            self.engine.step()

    async def close(self) -> None:
        """Ends as a killed process does: the sockets close, and nothing more is said."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        await self.server.close()

    async def __aenter__(self) -> FakeReplica:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
