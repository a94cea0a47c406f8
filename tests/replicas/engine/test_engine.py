"""The engine over a fake model: every output is compared with the naive one-sequence loop."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from shoal.replicas.errors import EngineError, PromptTooLong, RequestError
from shoal.replicas.offline import generate
from shoal.replicas.protocol import FinishReason, Request, SamplingParams
from tests.support.engines import EOS, VOCAB_SIZE, Transcript, make_engine, naive
from tests.support.fake_executor import logprob_of

PROMPT = tuple(range(4, 24))


def request(request_id: str = "a", prompt: tuple[int, ...] = PROMPT, n: int = 1, **sampling) -> Request:
    return Request(request_id, prompt, SamplingParams(**{"max_tokens": 12, **sampling}), num_samples=n)


def assert_idle(engine) -> None:
    engine.scheduler.check()
    assert not engine.has_work
    assert engine.load().num_free_blocks == engine.load().num_blocks
    assert engine.scheduler.table.num_free_rows == engine.config.scheduler.max_num_seqs
    assert engine.block_reports() == {}


@pytest.mark.parametrize(("max_steps_in_flight", "num_stages"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 4)])
@pytest.mark.parametrize("enable_chunked_prefill", [True, False])
def test_outputs_equal_the_naive_loop(max_steps_in_flight: int, num_stages: int, enable_chunked_prefill: bool):
    engine, executor = make_engine(
        max_steps_in_flight=max_steps_in_flight,
        num_stages=num_stages,
        enable_chunked_prefill=enable_chunked_prefill,
        max_num_batched_tokens=16 if enable_chunked_prefill else 64,
        max_model_len=64,
    )
    requests = [request(str(i), PROMPT[i : 20 - i], n=1 + i % 3, seed=i) for i in range(9)]
    for each in requests:
        engine.add_request(each)
    transcript = Transcript().run(engine)
    assert [transcript.outcome(each) for each in requests] == [naive(each) for each in requests]
    assert_idle(engine)
    assert executor.plans


def test_a_demand_of_four_pools_preempts_and_changes_nothing():
    engine, _ = make_engine(num_blocks=16, max_model_len=64)
    requests = [request(str(i), PROMPT[i : i + 8], max_tokens=24, seed=i, ignore_eos=True) for i in range(8)]
    for each in requests:
        engine.add_request(each)
    transcript = Transcript().run(engine)
    assert engine.load().num_preemptions > 0
    assert [transcript.outcome(each) for each in requests] == [naive(each) for each in requests]
    assert_idle(engine)


def test_cached_tokens_are_told_once():
    engine, _ = make_engine()
    engine.add_request(request("a"))
    Transcript().run(engine)
    engine.add_request(request("b", n=2))
    transcript = Transcript().run(engine)
    for sample in range(2):
        assert [delta.num_cached_tokens for delta in transcript.deltas["b", sample]][:2] == [16, 0]
    assert engine.load().prefix_cache_hits == 16


def test_the_output_of_one_turn_is_cached_for_the_next():
    engine, _ = make_engine()
    first = request("a", ignore_eos=True)
    engine.add_request(first)
    output = Transcript().run(engine).tokens("a")
    engine.add_request(request("b", (*PROMPT, *output, 5, 6)))
    assert Transcript().run(engine).deltas["b", 0][0].num_cached_tokens == 28  # of 31 that are in the cache


def test_stop_tokens_and_end_of_sequence():
    free = naive(request(ignore_eos=True, max_tokens=30, seed=1))[0][0]
    cases = {
        "length": (request("length", ignore_eos=True, max_tokens=30, seed=1), FinishReason.LENGTH, None),
        "stop": (request("stop", ignore_eos=True, stop_token_ids=(free[6],), seed=1), FinishReason.STOP, free[6]),
    }
    engine, _ = make_engine()
    for each, _, _ in cases.values():
        engine.add_request(each)
    transcript = Transcript().run(engine)
    for name, (each, reason, stop_reason) in cases.items():
        assert (transcript.end(name).finish_reason, transcript.end(name).stop_reason) == (reason, stop_reason)
        assert transcript.outcome(each) == naive(each)
    assert transcript.tokens("stop")[-1] == free[6]


def seed_that_ends_early() -> int:
    return next(s for s in range(1000) if 1 < len(naive(request(seed=s))[0][0]) < 6)


def test_end_of_sequence_is_the_last_token_and_min_tokens_defers_it():
    seed = seed_that_ends_early()
    engine, _ = make_engine()
    short, deferred = request("short", seed=seed), request("deferred", seed=seed, min_tokens=10)
    engine.add_request(short)
    engine.add_request(deferred)
    transcript = Transcript().run(engine)
    assert transcript.tokens("short")[-1] == EOS
    assert transcript.end("short").stop_reason is None
    assert len(transcript.tokens("deferred")) >= 10
    assert transcript.outcome(deferred) == naive(deferred)


def test_many_stop_tokens_of_one_row_leave_its_neighbours_alone():
    engine, _ = make_engine()
    stopping = request("stopping", stop_token_ids=tuple(range(10, 30)))
    plain = request("plain", seed=4, ignore_eos=True)
    for each in (stopping, plain):
        engine.add_request(each)
    transcript = Transcript().run(engine)
    assert transcript.outcome(stopping) == naive(stopping)
    assert transcript.outcome(plain) == naive(plain)


def test_a_resumed_request_goes_on_where_it_was():
    whole = request("whole", max_tokens=20, ignore_eos=True, seed=5)
    tokens = naive(whole)[0][0]
    resumed = Request("resumed", PROMPT, whole.sampling, emitted_token_ids=tuple(tokens[:7]))
    engine, _ = make_engine()
    engine.add_request(resumed)
    transcript = Transcript().run(engine)
    assert transcript.tokens("resumed") == tokens[7:]
    assert transcript.outcome(resumed) == naive(resumed)


def test_logprobs_belong_to_their_tokens():
    engine, _ = make_engine()
    asked = request("asked", logprobs=1, n=2, ignore_eos=True)
    engine.add_request(asked)
    engine.add_request(request("silent"))
    transcript = Transcript().run(engine)
    assert all(delta.logprobs is None for delta in transcript.deltas["silent", 0])
    for sample in range(2):
        context = list(PROMPT)
        for delta in transcript.deltas["asked", sample]:
            assert delta.logprobs is not None
            (logprob,), (token,) = delta.logprobs, delta.token_ids
            assert logprob.token_id == token
            assert math.isclose(logprob.logprob, logprob_of(context, token), rel_tol=1e-6)
            assert len(logprob.top) == 1
            context.append(token)


@pytest.mark.parametrize("num_blocks", [64, 12])
def test_prompt_logprobs_come_whole_with_the_first_delta(num_blocks: int):
    engine, _ = make_engine(num_blocks=num_blocks, max_num_batched_tokens=8, max_model_len=48)
    engine.add_request(request("warm", max_tokens=20))
    engine.add_request(request("scored", prompt_logprobs=2, n=2))
    transcript = Transcript().run(engine)
    first = transcript.deltas["scored", 0][0].prompt_logprobs
    assert first is not None
    assert first[0] is None
    for position, (entry, token) in enumerate(zip(first[1:], PROMPT[1:], strict=True), 1):
        assert entry is not None
        assert entry.token_id == token
        assert math.isclose(entry.logprob, logprob_of(PROMPT[:position], token), rel_tol=1e-6)
    others = [*transcript.deltas["scored", 0][1:], *transcript.deltas["scored", 1]]
    assert all(delta.prompt_logprobs is None for delta in others)
    assert transcript.deltas["scored", 0][0].num_cached_tokens == 0


def test_abort_at_any_step_frees_blocks_at_once_and_ends_each_sample_once():
    for num_steps in range(8):
        engine, _ = make_engine()
        engine.add_request(request("gone", n=3, ignore_eos=True))
        stays = request("stays", PROMPT[::-1])
        engine.add_request(stays)
        transcript = Transcript()
        for _ in range(num_steps):
            transcript.add(engine.step())
        engine.abort("gone")
        engine.abort("gone")
        engine.abort("never heard of")
        assert "gone" not in engine.block_reports()
        engine.scheduler.check()
        transcript.run(engine)
        for sample in range(3):
            assert transcript.end("gone", sample).finish_reason is FinishReason.ABORT
        assert transcript.outcome(stays) == naive(stays)
        assert_idle(engine)


@pytest.mark.parametrize("sample", [0, 1])
def test_one_sample_is_aborted_alone(sample: int):
    engine, _ = make_engine()
    asked = request("one", n=3, max_tokens=12, ignore_eos=True)
    engine.add_request(asked)
    engine.abort("one", sample)  # without a token yet: nothing happens, for all wait for one prompt
    transcript = Transcript()
    while len(transcript.tokens("one", sample)) < 5:
        transcript.add(engine.step())
    num_free = engine.load().num_free_blocks
    engine.abort("one", sample)
    engine.abort("one", sample)
    assert engine.load().num_free_blocks > num_free
    engine.scheduler.check()
    transcript.run(engine)
    assert transcript.end("one", sample).finish_reason is FinishReason.ABORT
    expected = [tokens for tokens, *_ in naive(asked)]
    expected[sample] = expected[sample][:5]
    assert [transcript.tokens("one", i) for i in range(3)] == expected
    assert_idle(engine)


def test_a_failed_row_ends_alone():
    engine, executor = make_engine()
    bad, good = request("bad", ignore_eos=True), request("good", PROMPT[::-1], ignore_eos=True)
    engine.add_request(bad)
    engine.add_request(good)
    transcript = Transcript()
    while not transcript.tokens("bad"):
        transcript.add(engine.step())
    executor.fail_rows[engine.scheduler.requests["bad"].leader.row] = "no finite logit"
    transcript.run(engine)
    assert transcript.end("bad").finish_reason is FinishReason.ERROR
    assert transcript.end("bad").error == "no finite logit"
    assert transcript.outcome(good) == naive(good)
    assert_idle(engine)
    engine.add_request(request("after", PROMPT))
    assert Transcript().run(engine).deltas["after", 0][0].num_cached_tokens == 0  # nothing of the failed row


def test_a_failed_step_ends_everything_and_the_engine():
    engine, executor = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add_request(request(name, n=2))
    executor.fail_step = 3
    transcript = Transcript().run(engine)
    for name in "abc":
        for sample in range(2):
            end = transcript.end(name, sample)
            assert end.finish_reason is FinishReason.ERROR
            assert end.error is not None
            assert "the fake step failed" in end.error
    assert isinstance(engine.failure, EngineError)
    assert engine.step() == []
    with pytest.raises(EngineError, match="takes no requests"):
        engine.add_request(request("d"))


def test_generate_raises_what_went_wrong():
    engine, executor = make_engine()
    outputs = generate(engine, [request("a", n=2), request("b")])
    assert [c.token_ids for c in outputs["a"]] == [tokens for tokens, _, _ in naive(request("a", n=2))]
    with pytest.raises(RequestError):
        generate(engine, [request("c"), request("d", ())])
    assert not engine.has_work
    executor.fail_step = len(executor.plans)
    with pytest.raises(EngineError, match="the fake step failed"):
        generate(engine, [request("e")])


def test_end_all_aborts_what_runs_and_what_waits():
    engine, executor = make_engine(max_num_seqs=2)
    for name in "abc":
        engine.add_request(request(name, n=2))
    engine.step()
    deltas = engine.end_all()
    assert sorted((d.request_id, d.sample) for d in deltas) == [(name, s) for name in "abc" for s in range(2)]
    assert all(delta.finish_reason is FinishReason.ABORT for delta in deltas)
    engine.shutdown()
    assert executor.closed


def test_the_cache_can_be_reset_when_idle():
    engine, _ = make_engine()
    engine.add_request(request("a"))
    engine.step()
    assert not engine.reset_prefix_cache()
    Transcript().run(engine)
    assert engine.load().num_cached_blocks > 0
    assert engine.reset_prefix_cache()
    assert engine.load().num_cached_blocks == 0


REFUSED = [
    (request(prompt=()), RequestError, ("empty",)),
    (request(prompt=(1, VOCAB_SIZE)), RequestError, (str(VOCAB_SIZE), str(VOCAB_SIZE - 1))),
    (request(prompt=(-1,)), RequestError, ("-1",)),
    (request(prompt=(1,) * 64), PromptTooLong, ("64 tokens", "at most 63")),
    (request(prompt=(1,) * 60, max_tokens=5), PromptTooLong, ("60 tokens", "65", "64", "to 4")),
    (request(n=9), RequestError, ("n is 9", "8")),
    (request(n=0), RequestError, ("n is 0",)),
    (request(prompt=(1,) * 8, n=8, max_tokens=20), RequestError, ("42 KV blocks", "20")),
    (request(max_tokens=0), RequestError, ("max_tokens is 0", "1")),
    (request(min_tokens=13), RequestError, ("min_tokens is 13", "12")),
    (request(temperature=math.nan), RequestError, ("nan",)),
    (request(temperature=math.inf), RequestError, ("inf",)),
    (request(temperature=1e39), RequestError, ("temperature is 1e+39", "3.4e+38")),
    (request(top_k=1 << 31), RequestError, ("top_k is 2147483648", "2147483647")),
    (request(top_p=0.0), RequestError, ("top_p is 0.0",)),
    (request(repetition_penalty=0.0), RequestError, ("repetition_penalty is 0.0", "0.01")),
    (request(repetition_penalty=math.nan), RequestError, ("repetition_penalty is nan",)),
    (request(bad_words=((1,), ())), RequestError, ("bad_words",)),
    (request(stop_token_ids=(VOCAB_SIZE,)), RequestError, ("stop_token_ids", str(VOCAB_SIZE))),
    (request(logit_bias=((VOCAB_SIZE, 1.0),)), RequestError, ("logit_bias", str(VOCAB_SIZE))),
    (request(logit_bias=((1, math.nan),)), RequestError, ("logit_bias",)),
    (request(seed=1 << 64), RequestError, ("seed",)),
    (Request("a", PROMPT, SamplingParams(max_tokens=2), emitted_token_ids=(1, 2)), RequestError, ("2 tokens",)),
    (Request("a", PROMPT, num_samples=2, emitted_token_ids=(1,)), RequestError, ("resumed", "2")),
]


@pytest.mark.parametrize(("refused", "error", "words"), REFUSED)
def test_bad_requests_are_refused_with_the_numbers(refused: Request, error: type[RequestError], words: tuple[str, ...]):
    engine, _ = make_engine(num_blocks=20, max_model_len=64)
    with pytest.raises(error) as caught:
        engine.add_request(refused)
    for word in words:
        assert word in str(caught.value)
    assert_idle(engine)


def test_the_context_can_be_filled_to_its_last_token():
    engine, _ = make_engine(num_blocks=16, max_model_len=64)
    for prompt_len in (1, 52, 63):
        each = request(str(prompt_len), (5,) * prompt_len, max_tokens=64 - prompt_len, ignore_eos=True)
        engine.add_request(each)
        transcript = Transcript().run(engine)
        assert transcript.outcome(each) == naive(each)
    assert_idle(engine)


def test_an_id_in_use_is_refused_and_may_be_used_again_later():
    engine, _ = make_engine()
    engine.add_request(request("a"))
    with pytest.raises(RequestError, match="in use"):
        engine.add_request(request("a"))
    Transcript().run(engine)
    engine.add_request(request("a"))
    Transcript().run(engine)


def test_steps_are_submitted_before_earlier_results_are_read():
    engine, executor = make_engine(max_steps_in_flight=3)
    engine.add_request(request("a", PROMPT[:2], ignore_eos=True))
    engine.step()
    assert len(executor.plans) == 3
    steps = [plan.step for plan in executor.plans]
    assert all(later == earlier + 1 for earlier, later in pairwise(steps))
