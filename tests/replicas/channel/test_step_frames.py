"""Decoding returns the encoded message, and refuses damaged frames."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.replicas.channel.step_frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    EndOfSteps,
    FrameError,
    StepFailure,
    decode,
    encode,
)
from shoal.replicas.plan import DEVICE_TOKEN, PLAN_ARRAYS, BlockCopy, LogprobArrays, RowStart, StepPlan, StepResult
from shoal.replicas.protocol import SamplingParams
from tests.support.steps import decode_plan, same

int32s = st.integers(-(2**31), 2**31 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)
seeds = st.integers(0, 2**64 - 1)
floats = st.floats(allow_nan=False)
steps = st.integers(0, 2**63 - 1)
token_tuples = st.lists(int32s, max_size=5).map(tuple)


def int_arrays(length: int) -> st.SearchStrategy[Any]:
    return st.lists(int32s, min_size=length, max_size=length).map(lambda values: np.array(values, np.int32))


def float_arrays(length: int) -> st.SearchStrategy[Any]:
    values = st.lists(st.floats(allow_nan=False, width=32), min_size=length, max_size=length)
    return values.map(lambda values: np.array(values, np.float32))


samplings = st.builds(
    SamplingParams,
    max_tokens=int64s,
    min_tokens=int64s,
    temperature=floats,
    top_p=floats,
    top_k=int64s,
    min_p=floats,
    presence_penalty=floats,
    frequency_penalty=floats,
    repetition_penalty=floats,
    logit_bias=st.lists(st.tuples(int32s, floats), max_size=4).map(tuple),
    allowed_token_ids=token_tuples,
    bad_words=st.lists(token_tuples, max_size=4).map(tuple),
    seed=seeds,
    stop_token_ids=token_tuples,
    ignore_eos=st.booleans(),
    logprobs=st.none() | int64s,
    prompt_logprobs=st.none() | int64s,
)
counts = st.integers(0, 2**31 - 1)
row_starts = st.builds(RowStart, counts, seeds, int64s, samplings, token_tuples, token_tuples, int64s)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    lengths = {letter: draw(st.integers(0, 6)) for letter in PLAN_ARRAYS.values()}
    arrays = {name: draw(int_arrays(lengths[letter])) for name, letter in PLAN_ARRAYS.items()}
    copies = tuple(draw(st.lists(st.builds(BlockCopy, int32s, int32s), max_size=3)))
    starts = tuple(draw(st.lists(row_starts, max_size=3)))
    return StepPlan(step=draw(steps), copies=copies, row_starts=starts, **arrays)


@st.composite
def logprob_arrays(draw: st.DrawFn) -> LogprobArrays:
    num_tokens, num_top = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    shape = (num_tokens, num_top)
    return LogprobArrays(
        draw(int_arrays(num_tokens)),
        draw(float_arrays(num_tokens)),
        draw(int_arrays(num_tokens)),
        draw(int_arrays(num_tokens * num_top)).reshape(shape),
        draw(float_arrays(num_tokens * num_top)).reshape(shape),
    )


results = st.builds(
    StepResult,
    steps,
    st.integers(0, 6).flatmap(int_arrays),
    st.none() | logprob_arrays(),
    st.lists(logprob_arrays(), max_size=3).map(tuple),
    st.lists(st.tuples(int32s, st.text()), max_size=3).map(tuple),
    st.integers(0, 6).flatmap(int_arrays),
)
messages = st.one_of(plans(), results, st.builds(StepFailure, steps, st.text()), st.just(EndOfSteps()))


def frame_of(message: Any) -> bytearray:
    return bytearray(encode(message))


def changed(frame: bytearray, offset: int, layout: str, value: Any) -> bytearray:
    frame = bytearray(frame)
    struct.pack_into(layout, frame, offset, value)
    return frame


@given(messages)
def test_what_is_decoded_is_what_was_encoded(message: Any) -> None:
    assert same(decode(frame_of(message)), message)


def test_an_array_that_is_a_column_of_another_is_encoded() -> None:
    table = np.arange(12, dtype=np.int32).reshape(4, 3)
    plan = decode_plan(5, 4)._replace(rows=table[:, 1])
    assert same(decode(frame_of(plan)), plan._replace(rows=table[:, 1].copy()))


OTHER_VALUES: dict[str, Any] = {
    "logit_bias": ((3, -0.1), (5, 100.0)),
    "allowed_token_ids": (1, 2),
    "bad_words": ((1, 2), (), (3,)),
    "stop_token_ids": (9,),
    "seed": 2**64 - 1,
    "ignore_eos": True,
    "logprobs": 0,
    "prompt_logprobs": 0,
}


@pytest.mark.parametrize("field", dataclasses.fields(SamplingParams), ids=lambda field: field.name)
def test_no_sampling_parameter_is_left_out(field: dataclasses.Field[Any]) -> None:
    value = OTHER_VALUES.get(field.name, field.default + 0.5 if isinstance(field.default, float) else field.default)
    if value == field.default:
        value += 7
    sampling = dataclasses.replace(SamplingParams(), **{field.name: value})
    assert sampling != SamplingParams()
    plan = decode_plan(0)._replace(row_starts=(RowStart(1, 2, 3, sampling),))
    assert same(decode(frame_of(plan)), plan)


def test_a_decode_plan_is_small_and_its_arrays_are_views() -> None:
    frame = frame_of(decode_plan(7, num_sequences=256))
    assert len(frame) <= 6400
    plan = decode(frame)
    assert isinstance(plan, StepPlan)
    received = np.frombuffer(frame, np.uint8)
    for name in ("rows", "starts", "num_tokens", "token_ids", "sample_slices", "sample_rows", "table_blocks"):
        assert np.shares_memory(getattr(plan, name), received), name


RICH = StepPlan(
    5,
    *(np.arange(3, dtype=np.int32) for _ in range(3)),
    np.full(4, DEVICE_TOKEN, np.int32),
    *(np.arange(2, dtype=np.int32) for _ in range(2)),
    copies=(BlockCopy(1, 2),),
    row_starts=(RowStart(1, 2, 3, SamplingParams(bad_words=((1, 2),), logit_bias=((1, 2.0),)), (1, 2, 3)),),
)
LOGPROBS = LogprobArrays(
    np.zeros(1, np.int32), np.zeros(1, np.float32), np.ones(1, np.int32), *(np.ones((1, 2), t) for t in ("i4", "f4"))
)
ANSWER = StepResult(5, np.ones(1, np.int32), LOGPROBS, (LOGPROBS,), ((0, "no finite logit: ∞"),))


@pytest.mark.parametrize("message", [RICH, ANSWER, StepFailure(5, "out of memory")], ids=lambda m: type(m).__name__)
def test_a_frame_cut_short_anywhere_is_refused(message: Any) -> None:
    frame = frame_of(message)
    for length in range(len(frame)):
        with pytest.raises(FrameError, match=r"\d+ bytes"):
            decode(frame[:length])
        if length >= HEADER_BYTES and length % 8 == 0:  # and so is one whose header says that it is that short
            with pytest.raises(FrameError, match=r"\d+"):
                decode(changed(frame[:length], 8, "<I", length))
    with pytest.raises(FrameError, match="claims"):
        decode(frame + b"\0")


@given(st.sampled_from([RICH, ANSWER]), st.data())
def test_garbage_is_refused_or_decoded_but_nothing_else(message: Any, data: st.DataObject) -> None:
    frame = frame_of(message)
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FrameError):
        assert isinstance(decode(frame), StepPlan | StepResult | StepFailure | EndOfSteps)


@given(st.binary(max_size=256))
def test_bytes_from_elsewhere_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode(bytearray(data))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "4s", b"HTTP", "begins with b'HTTP'"),
        (4, "<H", 99, "version 99, this process reads 2"),
        (6, "<H", 77, "kind 77"),
        (8, "<I", 8, "claims 8 bytes"),
        (8, "<I", MAX_FRAME_BYTES + 8, f"claims {MAX_FRAME_BYTES + 8} bytes"),
        (12, "<I", 2**32 - 8, "4294967288 bytes of rare parts"),
        (24, "<I", 2**32 - 1, "make 515396"),  # that many slices
        (52, "<I", 1, "has 6 array lengths"),
    ],
)
def test_headers_that_lie_are_refused_with_the_numbers(offset: int, layout: str, value: Any, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(changed(frame_of(RICH), offset, layout, value))


def test_log_probabilities_that_do_not_match_their_shape_are_refused() -> None:
    frame = frame_of(StepResult(5, np.ones(1, np.int32), LOGPROBS))
    begin = frame.index(b"\x93\x93\x01\x02\xc4\x1c")  # 1 token, 2 alternatives, 28 bytes
    with pytest.raises(FrameError, match="step 5 have 28 bytes, not those of 2 tokens and 2 alternatives"):
        decode(changed(frame, begin + 2, "<B", 2))


@pytest.mark.parametrize("name", ["temperature", "seed", "bad_words", "prompt_len"])
def test_a_value_of_another_type_is_refused(name: str) -> None:
    start = RICH.row_starts[0]
    wrong: Any = {name: "many"}
    if name == "prompt_len":
        start = start._replace(**wrong)
    else:
        start = start._replace(sampling=dataclasses.replace(start.sampling, **wrong))
    with pytest.raises(FrameError, match=r"rare part of step 5, \d+ bytes, is damaged: Expected"):
        decode(frame_of(RICH._replace(row_starts=(start,))))


@pytest.mark.parametrize("change", [{"row": -1}, {"seed": -1}], ids=str)
def test_a_row_start_below_zero_is_refused(change: dict[str, int]) -> None:
    start = RICH.row_starts[0]._replace(**change)
    with pytest.raises(FrameError, match=r"a row start of step \d+ has row -?1 and seed -?\d+, below 0"):
        decode(frame_of(RICH._replace(row_starts=(start,))))


def test_text_that_is_not_utf8_is_refused() -> None:
    frame = frame_of(StepFailure(3, "abcdefgh"))
    frame[frame.index(b"abcd")] = 0xFF
    with pytest.raises(FrameError, match="rare part of step 3, 9 bytes, is damaged: 'utf-8' codec"):
        decode(frame)


def test_a_message_with_a_file_name_that_is_not_utf8_is_encoded() -> None:
    name = b"model-\xff".decode("utf-8", "surrogateescape")
    assert decode(frame_of(StepFailure(3, name))) == StepFailure(3, "model-\\udcff")


def test_numpy_numbers_are_encoded_as_pythons() -> None:
    start: Any = RowStart(0, 1, 3, SamplingParams(), tuple(np.arange(3, dtype=np.int64)))
    plan = decode(frame_of(decode_plan(0)._replace(row_starts=(start,))))
    assert isinstance(plan, StepPlan)
    assert plan.row_starts[0].prompt_token_ids == (0, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": np.zeros(4, np.int64)}, "an array of int64"),
        ({"rows": np.zeros((4, 2), np.int32)}, r"shapes \[\(4, 2\)"),
        ({"starts": np.zeros(3, np.int32)}, "lengths"),
        ({"copies": None, "rows": [0, 1, 2, 3]}, "step 5 does not fit"),
        ({"step": 2**63}, "StepPlan of step 9223372036854775808"),
        ({"copies": (BlockCopy(2**64, 0),)}, "step 5 does not fit"),
        ({"row_starts": (RowStart(0, -(2**63) - 1, 0, SamplingParams()),)}, "step 5 does not fit"),
        ({"row_starts": (RowStart(0, 1, 1, SamplingParams(), (object(),)),)}, "step 5 does not fit"),  # type: ignore
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        encode(decode_plan(5, 4)._replace(**change))


def test_log_probabilities_of_wrong_shapes_are_refused() -> None:
    wrong = dataclasses.replace(LOGPROBS, top_ids=np.ones((2, 2), np.int32))
    with pytest.raises(FrameError, match="shapes"):
        encode(StepResult(1, np.ones(1, np.int32), wrong))
