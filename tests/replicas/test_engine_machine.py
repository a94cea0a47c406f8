"""Random lives of requests on tiny pools: forks, copies, eviction and preemption happen all the time."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.replicas.errors import RequestError
from shoal.replicas.protocol import FinishReason, Request, SamplingParams
from tests.support.engines import Transcript, make_engine, naive

STEMS = ((5, 6, 7, 8, 9, 10, 11, 12, 13), (5, 6, 7, 8, 20, 21, 22, 23, 24), (30, 31))


class EngineMachine(RuleBasedStateMachine):
    """Add, step, abort and fail in any order; outputs are those of the naive loop, blocks are conserved."""

    @initialize(
        num_blocks=st.integers(12, 20),
        block_size=st.sampled_from([2, 4]),
        budget=st.integers(4, 12),
        max_steps_in_flight=st.integers(1, 3),
        enable_prefix_caching=st.booleans(),
    )
    def start(
        self, num_blocks: int, block_size: int, budget: int, max_steps_in_flight: int, enable_prefix_caching: bool
    ) -> None:
        self.engine, self.executor = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=4,
            max_num_batched_tokens=budget,
            max_model_len=24,
            max_steps_in_flight=max_steps_in_flight,
            enable_prefix_caching=enable_prefix_caching,
        )
        self.transcript = Transcript()
        self.accepted: list[Request] = []
        self.aborted: set[str] = set()
        self.failed: set[str] = set()

    @rule(
        stem=st.sampled_from(STEMS),
        stem_len=st.integers(1, 9),
        tail=st.lists(st.integers(0, 39), max_size=4),
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 14),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stops=st.sets(st.integers(0, 39), max_size=3),
        priority=st.integers(0, 1),
        salt=st.sampled_from(["", "tenant"]),
        seed=st.integers(0, 3),
        scored=st.booleans(),
    )
    def add(self, stem, stem_len, tail, n, max_tokens, min_tokens, ignore_eos, stops, priority, salt, seed, scored):
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            ignore_eos=ignore_eos,
            stop_token_ids=tuple(stops),
            seed=seed,
            prompt_logprobs=0 if scored else None,
        )
        prompt = (*stem[:stem_len], *tail)
        name = str(len(self.accepted))
        request = Request(name, prompt, sampling, num_samples=n, priority=priority, cache_salt=salt)
        self._accept(request)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data(), num_emitted=st.integers(1, 6))
    def resume(self, data: st.DataObject, num_emitted: int) -> None:
        """A request comes back with what its client has already, as after the loss of a replica."""
        earlier = data.draw(st.sampled_from(self.accepted))
        emitted = naive(earlier)[0][0][:num_emitted]
        if earlier.emitted_token_ids or naive(earlier)[0][0] == emitted:
            return
        self._accept(
            Request(
                str(len(self.accepted)), earlier.prompt_token_ids, earlier.sampling, emitted_token_ids=tuple(emitted)
            )
        )

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.transcript.add(self.engine.step())

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(self.accepted)).request_id
        if name in self.engine.scheduler.requests:
            self.aborted.add(name)
        self.engine.abort(name)
        assert name not in self.engine.scheduler.requests

    @precondition(lambda self: self.engine.scheduler.requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """The next sample of one row fails; it may be that of a later sequence in the same row."""
        row = data.draw(st.integers(0, 3))
        self.executor.fail_rows[row] = "no token can be chosen"

    def _accept(self, request: Request) -> None:
        try:
            self.engine.add_request(request)
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
        for _ in range(2000):  # far more steps than any of these can need: a stall must not pass for progress
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work, "the engine stalls"
        assert self.engine.failure is None
        assert self.engine.load().num_free_blocks == self.engine.load().num_blocks
        for request in self.accepted:
            self._compare(request)

    def _compare(self, request: Request) -> None:
        for sample, (tokens, reason, stop_reason) in enumerate(naive(request)):
            end = self.transcript.end(request.request_id, sample)
            got = self.transcript.tokens(request.request_id, sample)
            if end.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                assert (end.finish_reason is FinishReason.ERROR) == (end.error == "no token can be chosen")
                assert end.finish_reason is FinishReason.ERROR or request.request_id in self.aborted
                assert got == tokens[: len(got)]
            else:
                assert (got, end.finish_reason, end.stop_reason) == (tokens, reason, stop_reason)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(stateful_step_count=40)
