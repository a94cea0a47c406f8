"""Random operations on tiny pools: forks, copies, eviction, preemption and draft tokens are frequent."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.replicas.errors import RequestError
from shoal.replicas.protocol import FinishReason, Request, SamplingParams
from tests.support.engines import NoisyProposer, Transcript, make_engine, naive
from tests.support.fake_executor import logprob_of

STEMS = ((5, 6, 7, 8, 9, 10, 11, 12, 13), (5, 6, 7, 8, 20, 21, 22, 23, 24), (30, 31))


def samples_of(request: Request) -> range:
    return range(request.first_sample, request.first_sample + request.num_samples)


class EngineMachine(RuleBasedStateMachine):
    """Add, step, abort and fail in any order; outputs equal the naive loop's, blocks are conserved."""

    @initialize(
        num_blocks=st.integers(12, 20),
        block_size=st.sampled_from([2, 4]),
        budget=st.integers(4, 12),
        num_stages=st.sampled_from([1, 2, 4]),
        more_in_flight=st.integers(0, 4),
        enable_prefix_caching=st.booleans(),
        max_drafts=st.integers(0, 3),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        budget: int,
        num_stages: int,
        more_in_flight: int,
        enable_prefix_caching: bool,
        max_drafts: int,
    ) -> None:
        self.engine, self.executor = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=24,
            max_steps_in_flight=num_stages + more_in_flight,
            enable_prefix_caching=enable_prefix_caching,
            num_stages=num_stages,
        )
        self.engine.scheduler.proposer = NoisyProposer(max_drafts) if max_drafts else None
        self.transcript = Transcript()
        self.accepted: list[Request] = []
        self.aborted: set[tuple[str, int]] = set()

    @rule(
        stem=st.sampled_from(STEMS),
        stem_len=st.integers(1, 9),
        tail=st.lists(st.integers(0, 39), max_size=4),
        n=st.integers(1, 4),
        first_sample=st.integers(0, 2),
        max_tokens=st.integers(1, 14),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stops=st.sets(st.integers(0, 39), max_size=3),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "tenant"]),
        seed=st.integers(0, 3),
        logprobs=st.sampled_from([None, 0, 2]),
        prompt_logprobs=st.sampled_from([None, 0, 2]),
        max_steps_in_flight=st.sampled_from([None, 1, 2]),
    )
    def add(
        self, stem, stem_len, tail, n, first_sample, max_tokens, min_tokens, ignore_eos, stops, priority, salt, seed,
        logprobs, prompt_logprobs, max_steps_in_flight,
    ):  # fmt: skip
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(stops),
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        prompt = (*stem[:stem_len], *tail)
        name = str(len(self.accepted))
        request = Request(name, prompt, sampling, n, first_sample, priority=priority, cache_salt=salt)
        self._accept(request, max_steps_in_flight)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), num_emitted=st.integers(1, 6))
    def resume(self, data: st.DataObject, num_emitted: int) -> None:
        """A request returns with the tokens that its client has, as after the loss of a replica."""
        earlier = data.draw(st.sampled_from(self.accepted))
        emitted = naive(earlier)[0][0][:num_emitted]
        if earlier.emitted_token_ids or naive(earlier)[0][0] == emitted:
            return
        name, prompt = str(len(self.accepted)), earlier.prompt_token_ids
        self._accept(Request(name, prompt, earlier.sampling, 1, earlier.first_sample, tuple(emitted)))

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.transcript.add(self.engine.step())

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.accepted))
        if request.request_id in self.engine.scheduler.requests:
            self.aborted |= {(request.request_id, sample) for sample in samples_of(request)}
        self.engine.abort(request.request_id)
        assert request.request_id not in self.engine.scheduler.requests

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def abort_sample(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.accepted))
        sample = data.draw(st.sampled_from(samples_of(request)))
        if self.transcript.tokens(request.request_id, sample):
            self.aborted.add((request.request_id, sample))
        self.engine.abort(request.request_id, sample)

    @precondition(lambda self: self.engine.scheduler.requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """The next sample of one row fails; it may be that of a later sequence in the same row."""
        row = data.draw(st.integers(0, 3))
        self.executor.fail_rows[row] = "no token can be chosen"

    def _accept(self, request: Request, max_steps_in_flight: int | None = None) -> None:
        try:
            self.engine.add_request(request, max_steps_in_flight=max_steps_in_flight)
        except RequestError:
            return
        self.accepted.append(request)

    @invariant()
    def conserved(self) -> None:
        if not hasattr(self, "engine"):
            return
        scheduler = self.engine.scheduler
        scheduler.check()
        load = self.engine.load()
        assert load.num_free_blocks + load.blocks.shared + load.blocks.private == load.num_blocks
        assert load.num_running + load.num_waiting == sum(s.num_open for s in scheduler.requests.values())

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):  # far more steps than needed: a stall must not pass for progress
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work, "the engine stalls"
        assert self.engine.failure is None
        assert self.engine.load().num_free_blocks == self.engine.load().num_blocks
        for request in self.accepted:
            self._compare(request)
            self._compare_scores(request)

    def _compare(self, request: Request) -> None:
        for sample, (tokens, reason, stop_reason) in enumerate(naive(request), request.first_sample):
            end = self.transcript.end(request.request_id, sample)
            got = self.transcript.tokens(request.request_id, sample)
            if end.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert (end.finish_reason is FinishReason.ERROR) == (end.error == "no token can be chosen")
                assert end.finish_reason is FinishReason.ERROR or (request.request_id, sample) in self.aborted
                assert got == tokens[: len(got)]
            else:
                assert (got, end.finish_reason, end.stop_reason) == (tokens, reason, stop_reason)

    def _compare_scores(self, request: Request) -> None:
        """The first delta alone has the prompt's data; log-probabilities are those of the whole context."""
        num_top, prompt = request.sampling.logprobs, request.prompt_token_ids
        reported = []
        for sample in samples_of(request):
            context = [*prompt, *request.emitted_token_ids]
            deltas = [delta for delta in self.transcript.deltas[request.request_id, sample] if delta.token_ids]
            assert all(delta.num_cached_tokens == 0 for delta in deltas[1:])
            assert all(delta.num_cached_tokens < len(context) for delta in deltas[:1])
            reported += [(sample, i, d.prompt_logprobs) for i, d in enumerate(deltas) if d.prompt_logprobs is not None]
            for delta in deltas:
                self._compare_score(delta.logprobs, context, delta.token_ids[0], num_top)
                context += delta.token_ids
        asked = request.sampling.prompt_logprobs is not None and not request.emitted_token_ids
        if not asked or not self.transcript.tokens(request.request_id, request.first_sample):
            assert reported == []
            return
        ((sample, index, entries),) = reported
        assert (sample, index, entries[0], len(entries)) == (request.first_sample, 0, None, len(prompt))
        for position, token in enumerate(prompt[1:], 1):
            entry = entries[position : position + 1]
            self._compare_score(entry, list(prompt[:position]), token, request.sampling.prompt_logprobs)

    @staticmethod
    def _compare_score(entries, context: list[int], token: int, num_top: int | None) -> None:
        if num_top is None:
            assert entries is None
            return
        (entry,) = entries
        assert (entry.token_id, len(entry.top)) == (token, num_top)
        assert math.isclose(entry.logprob, logprob_of(context, token), rel_tol=1e-6)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(stateful_step_count=40)
