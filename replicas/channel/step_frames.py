"""Step plans and results as binary frames, as they travel between an engine and its shards.

    header   64 bytes: magic, version, kind, length of the frame, length of its rare part, step, ten counts
    ints     int32, array after array, whose lengths follow from the counts; padded to 8 bytes
    rare     what most steps do not have: starts of rows with their sampling parameters, log-probabilities, messages

All of it is little-endian and nothing is pickled. A decoded plan's arrays are views on the frame that was received.
Lengths are checked before anything is read, so that a frame cut short, or of another version, is a FrameError; what
the numbers mean is not, since a peer has proved who it is before its first frame. A decode plan of 256 sequences is
6.4 KB, which takes 3 us to encode and as many to decode (EPYC): the number of arrays counts, not their bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..plan import NO_INTS, BlockCopy, Ints, LogprobArrays, RowStart, StepPlan, StepResult
from ..protocol import SamplingParams

MAGIC = b"SHOL"
VERSION = 1
MAX_FRAME_BYTES = 1 << 30  # 256 rows that all start with a history of 1M tokens
_ALIGNMENT = 8
_PADDING = bytes(_ALIGNMENT)
_INT32 = np.dtype(np.int32)
_NUM_COUNTS = 10

# magic, version, kind, length, rare length, step, counts
_HEADER = struct.Struct(f"<4sHHIIq{_NUM_COUNTS}I")
_LENGTHS = struct.Struct("<4sHHI")
HEADER_BYTES = _HEADER.size
_NO_COUNTS = (0,) * _NUM_COUNTS

# row, prompt_len, num_emitted, seed; of the sampling parameters: the three integers, the six floats, seed, presence
# bits, the two counts of log-probabilities; lengths of the eight arrays
_ROW_START = struct.Struct("<3qQ3q6dQI4x2q8I")
_HAS_LOGPROBS, _HAS_PROMPT_LOGPROBS, _IGNORES_EOS = 1, 2, 4
_LOGPROB_SHAPE = struct.Struct("<II")
_TEXT = struct.Struct("<iI")  # a number that belongs to it, its bytes


class FrameError(EngineError):
    """A frame that cannot be written, or bytes that are not a frame of this version."""


class FrameKind(IntEnum):
    PLAN = 1
    RESULT = 2
    FAILURE = 3
    END = 4


# How many of a frame's counts its kind uses.
_COUNTS: dict[int, int] = {FrameKind.PLAN: 7, FrameKind.RESULT: 4, FrameKind.FAILURE: 0, FrameKind.END: 0}


@dataclass(frozen=True, slots=True)
class StepFailure:
    """A shard could not run a step."""

    step: int
    message: str


@dataclass(frozen=True, slots=True)
class EndOfSteps:
    """The engine will send no more plans."""


Frame = bytes | bytearray | memoryview
Message = StepPlan | StepResult | StepFailure | EndOfSteps


def encode(message: Message) -> bytes:
    """The message's frame. Raises FrameError if a value does not fit its field, or the frame is too large."""
    try:
        if isinstance(message, StepPlan):
            return _plan_frame(message)
        if isinstance(message, StepResult):
            return _result_frame(message)
        rare = _RareWriter()
        if isinstance(message, StepFailure):
            rare.text(0, message.message)
            return _frame(FrameKind.FAILURE, message.step, (), [], rare)
        return _frame(FrameKind.END, 0, (), [], rare)
    except (struct.error, AttributeError, OverflowError, TypeError, ValueError) as error:
        what = f"{type(message).__name__} of step {getattr(message, 'step', 0)}"
        raise FrameError(f"{what} does not fit a frame: {error}") from error


def _plan_frame(plan: StepPlan) -> bytes:
    slices, tokens, samples = len(plan.rows), len(plan.token_ids), len(plan.sample_rows)
    tables, scored = len(plan.table_rows), len(plan.scored_slices)
    arrays = [
        *(plan.rows, plan.starts, plan.num_tokens, plan.token_ids, plan.sample_slices, plan.sample_rows),
        *(plan.table_rows, plan.table_indices, plan.table_blocks, plan.scored_slices, plan.scored_next),
    ]
    lengths = [slices, slices, slices, tokens, samples, samples, tables, tables, tables, scored, scored]
    if [len(array) for array in arrays] != lengths:
        raise ValueError(f"its arrays have lengths {list(map(len, arrays))} where {lengths} belong together")
    if plan.copies:
        arrays.append(np.array(plan.copies, np.int32).reshape(-1))
    rare = _RareWriter()
    for start in plan.row_starts:
        _write_row_start(rare, start)
    counts = (slices, tokens, samples, tables, scored, len(plan.copies), len(plan.row_starts))
    return _frame(FrameKind.PLAN, plan.step, counts, arrays, rare)


def _result_frame(result: StepResult) -> bytes:
    rare = _RareWriter()
    if result.logprobs is not None:
        _write_logprobs(rare, result.logprobs)
    for logprobs in result.prompt_logprobs:
        _write_logprobs(rare, logprobs)
    for row, message in result.failed_rows:
        rare.text(row, message)
    has_logprobs = result.logprobs is not None
    counts = (len(result.token_ids), int(has_logprobs), len(result.prompt_logprobs), len(result.failed_rows))
    return _frame(FrameKind.RESULT, result.step, counts, [result.token_ids], rare)


def _frame(kind: FrameKind, step: int, counts: tuple[int, ...], arrays: list[Ints], rare: _RareWriter) -> bytes:
    for array in arrays:
        if array.dtype is not _INT32 and array.dtype != _INT32:
            raise ValueError(f"an array of {array.dtype} is not one of int32")
    ints_end = HEADER_BYTES + 4 * sum(map(len, arrays))
    length = _padded(ints_end) + rare.num_bytes
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"it takes {length} bytes, a frame at most {MAX_FRAME_BYTES}; let a step start fewer rows")
    spare = _NO_COUNTS[len(counts) :]
    header = _HEADER.pack(MAGIC, VERSION, kind, length, rare.num_bytes, step, *counts, *spare)
    parts: list[Any] = [header, *arrays, _PADDING[: -ints_end % _ALIGNMENT], *rare.parts]
    try:  # 0.4 us, where numpy takes 1.4 us to concatenate (EPYC)
        frame = b"".join(parts)
    except TypeError:  # some array is every n-th number of another one, and not in one piece
        frame = b"".join([part if isinstance(part, bytes) else part.tobytes() for part in parts])
    if len(frame) != length:
        raise ValueError(f"its arrays have shapes {[array.shape for array in arrays]}, not one axis each")
    return frame


def frame_length(view: Frame) -> int:
    """Length of the frame that begins with these HEADER_BYTES. Raises FrameError if they begin no frame."""
    magic, version, kind, length = _LENGTHS.unpack_from(view)
    if magic != MAGIC:
        raise FrameError(f"a frame begins with {magic!r}, not with {MAGIC!r}: the peer speaks another protocol")
    if version != VERSION:
        raise FrameError(f"a frame has version {version}, this process reads {VERSION}; run one version of Shoal")
    if not HEADER_BYTES <= length <= MAX_FRAME_BYTES or length % _ALIGNMENT:
        raise FrameError(
            f"a frame of kind {kind} claims {length} bytes; frames have {HEADER_BYTES} to {MAX_FRAME_BYTES}, "
            f"in multiples of {_ALIGNMENT}"
        )
    return length


def decode(frame: Frame) -> Message:
    """The message in one whole frame; its arrays are views on it. Raises FrameError if it is not one."""
    if len(frame) < HEADER_BYTES:
        raise FrameError(f"a frame of {len(frame)} bytes is shorter than its header of {HEADER_BYTES}")
    length = frame_length(frame)
    if length != len(frame):
        raise FrameError(f"a frame claims {length} bytes and has {len(frame)}")
    _, _, kind, _, rare_bytes, step, *counts = _HEADER.unpack_from(frame)
    num_ints = _num_ints(kind, counts)
    rare_begin = _padded(HEADER_BYTES + 4 * num_ints)
    if rare_begin + rare_bytes != length:
        raise FrameError(
            f"the frame of step {step} has {length} bytes; its counts {counts} and {rare_bytes} bytes of rare parts "
            f"make {rare_begin + rare_bytes}"
        )
    ints = np.frombuffer(frame, np.int32, num_ints, HEADER_BYTES) if num_ints else NO_INTS
    rare = _RareReader(frame, rare_begin, step)
    if kind == FrameKind.PLAN:
        message = _read_plan(step, counts, ints, rare)
    elif kind == FrameKind.RESULT:
        message = _read_result(step, counts, ints, rare)
    elif kind == FrameKind.FAILURE:
        message = StepFailure(step, rare.text()[1])
    else:
        message = EndOfSteps()
    rare.finish()
    return message


def _num_ints(kind: int, counts: list[int]) -> int:
    used = _COUNTS.get(kind)
    if used is None:
        raise FrameError(f"a frame is of kind {kind}; this process knows {[int(known) for known in FrameKind]}")
    if any(counts[used:]):
        raise FrameError(f"a frame of kind {kind} has {used} counts, and was given {counts}")
    if kind == FrameKind.PLAN:
        slices, tokens, samples, tables, scored, copies, _ = counts[:used]
        return 3 * slices + tokens + 2 * samples + 3 * tables + 2 * scored + 2 * copies
    return counts[0] if kind == FrameKind.RESULT else 0


def _read_plan(step: int, counts: list[int], ints: Ints, rare: _RareReader) -> StepPlan:
    slices, tokens, samples, tables, scored, num_copies, num_row_starts = counts[:7]
    sample_begin = 3 * slices + tokens
    table_begin = sample_begin + 2 * samples
    scored_begin = table_begin + 3 * tables
    copies_begin = scored_begin + 2 * scored
    copies = ()
    if num_copies:
        copies = tuple(BlockCopy(*pair) for pair in ints[copies_begin:].reshape(num_copies, 2).tolist())
    row_starts = tuple(_read_row_start(rare) for _ in range(num_row_starts)) if num_row_starts else ()
    return StepPlan(
        step,
        ints[:slices],
        ints[slices : 2 * slices],
        ints[2 * slices : 3 * slices],
        ints[3 * slices : sample_begin],
        ints[sample_begin : sample_begin + samples],
        ints[sample_begin + samples : table_begin],
        ints[table_begin : table_begin + tables],
        ints[table_begin + tables : table_begin + 2 * tables],
        ints[table_begin + 2 * tables : scored_begin],
        copies,
        row_starts,
        ints[scored_begin : scored_begin + scored],
        ints[scored_begin + scored : copies_begin],
    )


def _read_result(step: int, counts: list[int], ints: Ints, rare: _RareReader) -> StepResult:
    _, has_logprobs, num_prompts, num_failed = counts[:4]
    if has_logprobs > 1:
        raise FrameError(f"the result of step {step} claims {has_logprobs} sets of log-probabilities, not 0 or 1")
    logprobs = _read_logprobs(rare) if has_logprobs else None
    prompts = tuple(_read_logprobs(rare) for _ in range(num_prompts))
    return StepResult(step, ints, logprobs, prompts, tuple(rare.text() for _ in range(num_failed)))


def _write_row_start(rare: _RareWriter, start: RowStart) -> None:
    params = start.sampling
    presence = (
        (params.logprobs is not None) * _HAS_LOGPROBS
        | (params.prompt_logprobs is not None) * _HAS_PROMPT_LOGPROBS
        | bool(params.ignore_eos) * _IGNORES_EOS
    )
    arrays: tuple[tuple[Sequence[Any], Any], ...] = (
        (start.prompt_token_ids, np.int32),
        (start.emitted_token_ids, np.int32),
        (params.allowed_token_ids, np.int32),
        (params.stop_token_ids, np.int32),
        ([len(words) for words in params.bad_words], np.int32),
        ([token for words in params.bad_words for token in words], np.int32),
        ([token for token, _ in params.logit_bias], np.int32),
        ([bias for _, bias in params.logit_bias], np.float64),
    )
    rare.pack(
        _ROW_START,
        *(start.row, start.prompt_len, start.num_emitted, start.seed),
        *(params.max_tokens, params.min_tokens, params.top_k),
        *(params.temperature, params.top_p, params.min_p),
        *(params.presence_penalty, params.frequency_penalty, params.repetition_penalty),
        *(params.seed, presence, params.logprobs or 0, params.prompt_logprobs or 0),
        *(len(values) for values, _ in arrays),
    )
    for values, dtype in arrays:
        rare.array(values, dtype)


def _read_row_start(rare: _RareReader) -> RowStart:
    values = rare.unpack(_ROW_START)
    row, prompt_len, num_emitted, seed, max_tokens, min_tokens, top_k = values[:7]
    temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty = values[7:13]
    sampling_seed, presence, logprobs, prompt_logprobs = values[13:17]
    lengths = values[17:]
    prompt, emitted, allowed, stop, word_lengths, words, bias_ids = (rare.ints(length) for length in lengths[:7])
    biases = rare.array(lengths[7], np.float64).tolist()
    if len(bias_ids) != len(biases) or sum(word_lengths) != len(words) or min(word_lengths, default=0) < 0:
        raise FrameError(f"row {row} of step {rare.step} starts with arrays that do not match: lengths {lengths}")
    flat = iter(words)
    return RowStart(
        row,
        seed,
        prompt_len,
        SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            logit_bias=tuple(zip(bias_ids, biases, strict=True)),
            allowed_token_ids=allowed,
            bad_words=tuple(tuple(next(flat) for _ in range(length)) for length in word_lengths),
            seed=sampling_seed,
            stop_token_ids=stop,
            ignore_eos=bool(presence & _IGNORES_EOS),
            logprobs=logprobs if presence & _HAS_LOGPROBS else None,
            prompt_logprobs=prompt_logprobs if presence & _HAS_PROMPT_LOGPROBS else None,
        ),
        prompt,
        emitted,
        num_emitted,
    )


def _write_logprobs(rare: _RareWriter, arrays: LogprobArrays) -> None:
    num_tokens, num_top = arrays.top_ids.shape
    shapes = [array.shape for array in (arrays.token_ids, arrays.logprobs, arrays.ranks)]
    if shapes != [(num_tokens,)] * 3 or arrays.top_logprobs.shape != (num_tokens, num_top):
        raise ValueError(f"log-probabilities have shapes {shapes}, {arrays.top_ids.shape}, {arrays.top_logprobs.shape}")
    rare.pack(_LOGPROB_SHAPE, num_tokens, num_top)
    for values in (arrays.token_ids, arrays.ranks, arrays.top_ids):
        rare.array(values, np.int32)
    for values in (arrays.logprobs, arrays.top_logprobs):
        rare.array(values, np.float32)


def _read_logprobs(rare: _RareReader) -> LogprobArrays:
    num_tokens, num_top = rare.unpack(_LOGPROB_SHAPE)
    token_ids, ranks, top_ids = (rare.array(n, np.int32) for n in (num_tokens, num_tokens, num_tokens * num_top))
    logprobs, top_logprobs = (rare.array(n, np.float32) for n in (num_tokens, num_tokens * num_top))
    shape = (num_tokens, num_top)
    return LogprobArrays(token_ids, logprobs, ranks, top_ids.reshape(shape), top_logprobs.reshape(shape))


class _RareWriter:
    """Parts one after the other, each padded to 8 bytes."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.num_bytes = 0

    def pack(self, layout: struct.Struct, *values: Any) -> None:
        self._add(layout.pack(*values))

    def array(self, values: Sequence[Any] | NDArray[Any], dtype: Any) -> None:
        if len(values):
            self._add(np.asarray(values, dtype).tobytes())

    def text(self, number: int, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._add(_TEXT.pack(number, len(data)) + data)

    def _add(self, data: bytes) -> None:
        self.parts.append(data.ljust(_padded(len(data)), b"\0"))
        self.num_bytes += _padded(len(data))


class _RareReader:
    """Takes the parts in the order in which they were written, and none beyond the frame's end."""

    def __init__(self, frame: Frame, begin: int, step: int) -> None:
        self._frame, self._begin, self.step = frame, begin, step

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack_from(self._frame, self._take(layout.size))

    def array(self, length: int, dtype: type[np.generic]) -> NDArray[Any]:
        begin = self._take(length * np.dtype(dtype).itemsize)
        return np.frombuffer(self._frame, dtype, length, begin) if length else np.empty(0, dtype)

    def ints(self, length: int) -> tuple[int, ...]:
        return tuple(self.array(length, np.int32).tolist()) if length else ()

    def text(self) -> tuple[int, str]:
        number, length = _TEXT.unpack_from(self._frame, self._take(_TEXT.size))
        begin = self._take(length)
        try:
            return number, bytes(self._frame[begin : begin + length]).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise FrameError(f"a message of step {self.step} is not UTF-8: {error}") from error

    def finish(self) -> None:
        if self._begin != len(self._frame):
            raise FrameError(f"the frame of step {self.step} has {len(self._frame) - self._begin} bytes too many")

    def _take(self, num_bytes: int) -> int:
        """Where the next part begins."""
        begin, left = self._begin, len(self._frame) - self._begin
        if num_bytes > left:
            raise FrameError(f"the frame of step {self.step} wants {num_bytes} more bytes and has {left}")
        self._begin += _padded(num_bytes)  # within the frame: that is a multiple of 8, and so is where parts begin
        return begin


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
