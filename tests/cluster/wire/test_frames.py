"""Frames, messages and errors survive a round trip; garbage raises WireError only."""

from __future__ import annotations

import pickle
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cluster.wire import errors as cluster_errors
from shoal.cluster.wire.errors import WireError
from shoal.cluster.wire.frames import (
    Abort,
    AbortItem,
    Call,
    Draining,
    FrameSplitter,
    Ping,
    Pong,
    Rejected,
    Rejection,
    Reply,
    Step,
    Submit,
    SubmitItem,
    checked,
    encode,
    from_remote_error,
    replica_message_decoder,
    router_message_decoder,
    to_remote_error,
    to_stream_delta,
)
from shoal.replicas.errors import (
    CapacityError,
    EngineError,
    ModelError,
    PromptTooLong,
    RequestError,
    ServingError,
    UnknownModel,
)
from shoal.replicas.protocol import FinishReason, Logprob, ReplicaLoad, Request, SamplingParams, TokenDelta

TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=8).map(tuple)
FLOATS = st.floats(allow_nan=False)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 10**6),
    temperature=FLOATS,
    logit_bias=st.lists(st.tuples(st.integers(0, 10**6), FLOATS), max_size=3).map(tuple),
    bad_words=st.lists(TOKENS, max_size=3).map(tuple),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=TOKENS,
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
REQUESTS = st.builds(
    Request,
    request_id=st.text(max_size=20),
    prompt_token_ids=TOKENS,
    sampling=SAMPLING,
    num_samples=st.integers(1, 128),
    first_sample=st.integers(0, 128),
    emitted_token_ids=TOKENS,
    priority=st.integers(-(2**31), 2**31),
    cache_salt=st.text(max_size=20),
)
LOGPROBS = st.builds(
    Logprob,
    token_id=st.integers(0, 10**6),
    logprob=FLOATS,
    rank=st.integers(1, 10**6),
    top=st.lists(st.tuples(st.integers(0, 10**6), FLOATS), max_size=2).map(tuple),
)
DELTAS = st.builds(
    TokenDelta,
    request_id=st.just("r"),
    sample=st.integers(0, 127),
    token_ids=TOKENS,
    logprobs=st.none() | st.lists(LOGPROBS, max_size=2).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | st.integers(0, 10**6) | st.text(max_size=5),
    num_cached_tokens=st.integers(0, 10**6),
    prompt_logprobs=st.none() | st.lists(st.none() | LOGPROBS, max_size=2).map(tuple),
    error=st.none() | st.text(max_size=20),
)


@given(st.lists(st.tuples(st.integers(0, 2**63), REQUESTS), max_size=3))
def test_requests_come_out_as_they_went_in(pairs: list[tuple[int, Request]]) -> None:
    message = Submit([SubmitItem(stream, request) for stream, request in pairs])
    assert checked(router_message_decoder, encode(message)) == message


@given(st.integers(0, 2**63), st.lists(DELTAS, max_size=3))
def test_deltas_come_out_as_they_went_in(stream: int, deltas: list[TokenDelta]) -> None:
    message = Step([to_stream_delta(stream, delta) for delta in deltas], ReplicaLoad(num_running=3))
    decoded = checked(replica_message_decoder, encode(message))
    assert isinstance(decoded, Step)
    assert decoded == message
    for sent, got in zip(deltas, decoded.deltas, strict=True):
        assert got.stream == stream
        assert (got.sample, got.token_ids, got.finish_reason) == (sent.sample, sent.token_ids, sent.finish_reason)
        assert (got.logprobs, got.prompt_logprobs, got.error) == (sent.logprobs, sent.prompt_logprobs, sent.error)
        assert (got.stop_reason, got.num_cached_tokens) == (sent.stop_reason, sent.num_cached_tokens)


def test_a_token_takes_a_dozen_bytes() -> None:
    deltas = [to_stream_delta(100 + i, TokenDelta("r", 0, (20_000,))) for i in range(64)]
    assert len(encode(Step(deltas))) / 64 <= 14


@pytest.mark.parametrize("message", [Abort([AbortItem(1), AbortItem(2, 5)]), Call(7, "block_reports"), Ping(3)])
def test_router_messages(message: object) -> None:
    assert checked(router_message_decoder, encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Rejected([Rejection(5, to_remote_error(CapacityError("full", retry_after=2.5)))]),
        Reply(7, msgspec.Raw(encode({"a": 1}))),
        Pong(3),
        Draining(),
    ],
)
def test_replica_messages(message: object) -> None:
    assert encode(checked(replica_message_decoder, encode(message))) == encode(message)


@given(st.binary(max_size=200))
def test_garbage_is_a_wire_error(payload: bytes) -> None:
    for decoder in (router_message_decoder, replica_message_decoder):
        with suppress(WireError):
            checked(decoder, payload)


@given(REQUESTS, st.data())
def test_truncated_and_flipped_messages_are_wire_errors_or_messages(request: Request, data: st.DataObject) -> None:
    payload = encode(Submit([SubmitItem(1, request)]))
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(WireError):
        checked(router_message_decoder, payload[:cut])
    flipped = bytearray(payload)
    flipped[cut] ^= data.draw(st.integers(1, 255))
    with suppress(WireError):
        checked(router_message_decoder, bytes(flipped))


def test_deep_nesting_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        checked(router_message_decoder, b"\x91" * 100_000)


@given(st.lists(st.binary(max_size=50), max_size=6), st.data())
def test_frames_survive_any_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    splitter = FrameSplitter(limit=50)
    got: list[bytes] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += splitter.feed(stream[begin:end])
    assert got == payloads


def test_a_frame_above_the_limit_is_refused_at_its_header() -> None:
    splitter = FrameSplitter(limit=10)
    with pytest.raises(WireError, match=r"11 bytes .* 10"):
        list(splitter.feed((11).to_bytes(4, "big")))


@pytest.mark.parametrize(
    "error",
    [
        RequestError("no", param="n", code="bad"),
        PromptTooLong("5000 > 4096"),
        UnknownModel("which?"),
        CapacityError("later", retry_after=3.0),
        EngineError("broken"),
    ],
)
def test_errors_keep_class_and_fields(error: ServingError) -> None:
    got = from_remote_error(to_remote_error(error))
    assert type(got) is type(error)
    assert vars(got) == vars(error)


def test_errors_of_other_classes_arrive_as_their_nearest_base() -> None:
    assert type(from_remote_error(to_remote_error(cluster_errors.QueueFull("full")))) is CapacityError
    assert type(from_remote_error(to_remote_error(ModelError("file")))) is EngineError


@pytest.mark.parametrize(
    "error",
    [
        cluster_errors.QueueFull("full", retry_after=4.0),
        cluster_errors.NoReplica("none", retry_after=2.0),
        cluster_errors.ReplicaLost("gone"),
        cluster_errors.HandshakeError("who?"),
        cluster_errors.DirectoryUnavailable("away"),
    ],
)
def test_errors_survive_pickling(error: ServingError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert vars(copy) == vars(error)
    assert copy.args == error.args
