"""Ranks with a slice of the logits each choose the tokens of one process with all of them, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from shoal.kernels.sampling.sample import sample_rows
from shoal.kernels.sampling.score import score
from shoal.replicas.parallel.comm import ParallelContext
from shoal.replicas.parallel.vocabulary import VocabularySlice
from shoal.replicas.plan import RowStart, StepPlan
from shoal.replicas.protocol import SamplingParams
from shoal.replicas.sampling.sampler import Sampler
from shoal.replicas.worker.graphs import decode_shapes, mixed_shapes, with_filtered
from shoal.replicas.worker.step_inputs import HostInputs, make_row_state
from tests.support.thread_ranks import CountedCollectives, run_ranks

CPU = torch.device("cpu")
EOS = 3
NO_INTS = np.empty(0, np.int32)
INFINITY = float("inf")
PLAIN = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.8), SamplingParams(temperature=20.0))
FILTERED = (
    SamplingParams(top_k=5),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.0),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.8, min_p=0.01),
)


class RankSampler:
    """The sampler of one rank beside the row state that a runner keeps for it; row i has the i-th of `params`."""

    def __init__(self, vocab_size: int, params: Sequence[SamplingParams], comm: ParallelContext | None = None) -> None:
        state = make_row_state(len(params), 1, CPU)
        self.slice = VocabularySlice(vocab_size, comm or ParallelContext())
        self.sampler = Sampler(state.sampling, vocab_size, (EOS,), CPU, comm)
        starts = tuple(
            RowStart(row, 1000 * row + 2**63, 2, each, prompt_token_ids=(1, 2)) for row, each in enumerate(params)
        )
        HostInputs(state, block_size=16).send(StepPlan(0, *(NO_INTS,) * 6, row_starts=starts))
        for start in starts:
            self.sampler.start(start)

    def own(self, logits: torch.Tensor) -> torch.Tensor:
        """The rank's columns of the logits of all."""
        return logits[:, self.slice.first : self.slice.first + self.slice.size]

    def step(self, logits: torch.Tensor, rows: Sequence[int], position: int) -> torch.Tensor:
        """Tokens of a step, chosen as a runner has it done; a row of -1 is padding."""
        indices, positions = torch.tensor(rows), torch.arange(len(rows)) + position
        sampled = np.array([row for row in rows if row >= 0], np.int32)
        filtered = self.sampler.has_filters(sampled)
        tokens = self.sampler.sample(self.own(logits), indices, positions, filtered=filtered)
        if self.sampler.has_logits_processors(sampled):
            self.sampler.resample(self.own(logits), tokens, sampled, positions.numpy())
        return tokens


def make_logits(num_rows: int, vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def assert_as_one(size: int, vocab_size: int, params: Sequence[SamplingParams], steps, rows: Sequence[int]) -> None:
    """Every rank's tokens of `steps`, logits [K, vocab_size] each, are those of a sampler that has all logits."""
    alone = RankSampler(vocab_size, params)
    expected = [alone.step(logits, rows, 7 * i).tolist() for i, logits in enumerate(steps)]

    def work(comm: ParallelContext) -> list[list[int]]:
        rank = RankSampler(vocab_size, params, comm)
        return [rank.step(logits, rows, 7 * i).tolist() for i, logits in enumerate(steps)]

    assert run_ranks(size, work) == [expected] * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [64, 131, 1003])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("params", [PLAIN, PLAIN + FILTERED], ids=["plain", "filtered"])
def test_tokens_are_those_of_one_process(size, vocab_size, dtype, params):
    """Vocabularies that leave the last slice full, part full and empty; rows that divide among ranks or do not."""
    steps = [make_logits(len(params), vocab_size, dtype, seed) for seed in range(4)]
    assert_as_one(size, vocab_size, params, steps, range(len(params)))


@pytest.mark.parametrize("params", [PLAIN, FILTERED[:3]], ids=["plain", "filtered"])
@pytest.mark.parametrize("rows", [[2], [-1, 0], [1, -1, 2, -1, -1], [-1] * 9])
def test_padding_and_few_rows(rows, params):
    assert_as_one(4, 131, params, [make_logits(len(rows), 131)], rows)


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("params", [PLAIN[:1], FILTERED[:1]], ids=["greedy", "filtered"])
def test_ties_over_slices(params, repeats):
    """The lowest of the most probable, on any rank; a filter keeps all that tie. In few rows, and in more."""
    logits = make_logits(3, 96, torch.bfloat16)
    logits[0, [5, 40, 90]] = 20.0
    logits[1, [63, 64]] = 20.0
    logits[2] = 1.0
    rows = range(3 * repeats)
    assert_as_one(4, 96, params * len(rows), [logits.repeat(repeats, 1)], rows)


@pytest.mark.parametrize("params", [PLAIN[:1], PLAIN[1:2], FILTERED[:1], FILTERED[2:3]])
def test_rows_without_usable_logits(params):
    """NaN or infinity in one rank's slice makes the row useless on all; -inf alone in a slice does not."""
    logits = make_logits(6, 96)
    logits[0, 2], logits[1, 95], logits[2, 40] = float("nan"), float("nan"), INFINITY
    logits[3] = -INFINITY
    logits[4, 32:] = -INFINITY
    assert_as_one(3, 96, params * 6, [logits], range(6))

    def work(comm: ParallelContext) -> list[int]:
        return RankSampler(96, params * 6, comm).step(logits, range(6), 0).tolist()

    tokens = run_ranks(3, work)[0]
    assert tokens[:4] == [-1] * 4
    assert 0 <= tokens[4] < 32
    assert 0 <= tokens[5] < 96


WISHES = (
    SamplingParams(temperature=0.0, logit_bias=((70, 50.0), (1, -50.0))),
    SamplingParams(temperature=0.9, allowed_token_ids=(2, 80, 81)),
    SamplingParams(temperature=0.0, bad_words=((33,), (70, 5)), min_tokens=3, stop_token_ids=(40,)),
    SamplingParams(temperature=0.5, repetition_penalty=3.0, frequency_penalty=2.0, presence_penalty=1.0, top_k=4),
)


@pytest.mark.parametrize("params", [WISHES, (WISHES[0], PLAIN[0], WISHES[2]), PLAIN + WISHES], ids=len)
def test_wishes(params):
    """Three steps from the same logits, so that penalties and forbidden words meet what was chosen before."""
    logits = make_logits(len(params), 100)
    assert_as_one(2, 100, params, [logits] * 3, range(len(params)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("vocab_size", "size"), [(131, 2), (40, 4)])
@pytest.mark.parametrize("num_top", [0, 7, 40])
def test_scores_are_those_of_one_process(num_top, vocab_size, size, dtype):
    logits, tokens = make_logits(5, vocab_size, dtype), torch.tensor([0, vocab_size - 1, 31, 32, -1])
    logits[1, 9] = -INFINITY
    expected = score(logits, tokens, num_top)

    def work(comm: ParallelContext):
        rank = RankSampler(vocab_size, PLAIN, comm)
        return rank.sampler.score(rank.own(logits), tokens, num_top)

    for found in run_ranks(size, work):
        assert_close(found.logprobs, expected.logprobs)
        assert torch.equal(found.ranks, expected.ranks)
        assert_close(found.top_logprobs, expected.top_logprobs)
        assert_close(logits.float().log_softmax(1).gather(1, found.top_ids), expected.top_logprobs)
        assert all(len(set(ids)) == num_top for ids in found.top_ids.tolist())


def test_no_position_has_no_score():
    """The last chunk of a prompt has none where it is one token: what follows it is sampled, and scored there."""

    def work(comm: ParallelContext) -> list[list[int]]:
        rank = RankSampler(131, PLAIN, comm)
        nothing = rank.sampler.score(rank.own(make_logits(0, 131)), torch.empty(0, dtype=torch.int64), 7)
        return [list(tensor.shape) for tensor in nothing]

    assert run_ranks(2, work) == [[[0], [0], [0, 7], [0, 7]]] * 2


def test_what_ranks_exchange():
    """Plain steps: eight bytes a row. Filtered ones: each rank's slice once, shared out, and a token a row; few rows
    are gathered. Scores: the chosen logit, then eight bytes for each top token and for two sums.
    """
    num_rows, vocab_size, params = 6, 1024, PLAIN + FILTERED

    def work(comm: ParallelContext):
        assert isinstance(comm.tp, CountedCollectives)
        rank, sent = RankSampler(vocab_size, params, comm), []
        for rows in (range(num_rows), [0, 1, 2] * 2, [5]):
            comm.tp.sent = dict.fromkeys(comm.tp.sent, 0)
            rank.step(make_logits(len(rows), vocab_size), rows, 0)
            sent.append(comm.tp.sent)
        comm.tp.sent = dict.fromkeys(comm.tp.sent, 0)
        rank.sampler.score(rank.own(make_logits(num_rows, vocab_size)), torch.arange(num_rows), 5)
        return *sent, comm.tp.sent

    for filtered, plain, single, scores in run_ranks(2, work):
        assert single == {"all_reduce": 0, "all_gather": vocab_size // 2 * 4, "all_to_all": 0}
        assert scores == {"all_reduce": 0, "all_gather": (4 + 8 * 7) * num_rows, "all_to_all": 0}
        assert plain == {"all_reduce": 0, "all_gather": 8 * num_rows, "all_to_all": 0}
        slices = num_rows * vocab_size // 2 * 4
        assert filtered == {"all_reduce": 0, "all_gather": 8 * num_rows // 2, "all_to_all": slices}


@pytest.mark.parametrize(
    ("params", "filters"),
    [
        (SamplingParams(temperature=0.0, top_k=3, top_p=0.5), False),
        (SamplingParams(), False),
        (SamplingParams(top_k=100), False),
        (SamplingParams(top_k=99), True),
        (SamplingParams(top_p=0.99), True),
        (SamplingParams(min_p=0.01), True),
    ],
)
def test_which_rows_filter(params, filters):
    rows = np.array([1], np.int32)
    split = RankSampler(100, (FILTERED[0], params), ParallelContext(tp_size=2))
    assert split.sampler.has_filters(rows) is filters
    assert split.sampler.has_filters(np.array([1, 0], np.int32))
    # With all logits in one place one program does for both, and a stage that does not sample needs neither.
    assert not RankSampler(100, (FILTERED[0], params)).sampler.has_filters(rows)
    early = RankSampler(100, (FILTERED[0], params), ParallelContext(tp_size=2, pp_size=2))
    assert not early.sampler.has_filters(rows)


def test_a_row_that_starts_again_forgets_its_filters():
    rank = RankSampler(100, (FILTERED[0],), ParallelContext(tp_size=2))
    rank.sampler.start(RowStart(0, 1, 2, PLAIN[1]))
    assert not rank.sampler.has_filters(np.array([0], np.int32))


@pytest.mark.parametrize(("vocab_size", "size"), [(128256, 2), (1003, 4), (40, 4), (16, 2)])
def test_slices_cover_the_vocabulary(vocab_size, size):
    slices = [VocabularySlice(vocab_size, ParallelContext(tp_rank=rank, tp_size=size)) for rank in range(size)]
    tokens = [token for each in slices for token in range(each.first, each.first + each.size)]
    assert tokens == list(range(vocab_size))
    assert len({each.width for each in slices}) == 1
    assert all(each.first % 16 == 0 for each in slices)
    assert VocabularySlice(vocab_size, ParallelContext()).width == vocab_size


def test_tokens_do_not_depend_on_who_else_is_there():
    """A plain row beside a filtered one goes another way, and gets the token that it gets alone."""
    params, logits = (PLAIN[1], FILTERED[0]), make_logits(2, 200)

    def work(comm: ParallelContext) -> list[int]:
        rank = RankSampler(200, params, comm)
        return [int(rank.step(logits, [0, 1], 5)[0]), int(rank.step(logits[:1], [0], 5)[0])]

    alone = sample_rows(logits[:1], torch.tensor([0]), RankSampler(200, params).sampler._params, torch.tensor([5]))
    assert run_ranks(2, work) == [[int(alone)] * 2] * 2


def test_each_size_of_a_step_has_both_programs():
    """Sorted by tokens as before, and a step fits into the rooms of its own program alone."""
    for rooms in (decode_shapes(20), mixed_shapes(20, 200)):
        both = with_filtered(rooms)
        assert [room.tokens for room in both] == sorted(room.tokens for room in both)
        for filtered in (False, True):
            step = replace(rooms[0], filtered=filtered)
            fitting = [room for room in both if room.holds(step)]
            assert {room.filtered for room in fitting} == {filtered}
            assert [replace(room, filtered=False) for room in fitting] == [
                room for room in rooms if room.holds(rooms[0])
            ]
