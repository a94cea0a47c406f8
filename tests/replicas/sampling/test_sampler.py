"""What each sampling parameter does to a row's logits, against the formulas written out in Python."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from shoal.replicas.plan import DEVICE_TOKEN, RowStart, StepPlan
from shoal.replicas.protocol import SamplingParams
from shoal.replicas.sampling.processor_table import ProcessorSpec
from shoal.replicas.sampling.sampler import Sampler
from shoal.replicas.worker.step_inputs import HostInputs, make_row_state

VOCAB = 40
EOS = 3
CPU = torch.device("cpu")
NO_INTS = np.empty(0, np.int32)


class Rows:
    """A sampler beside the row state that a runner keeps for it."""

    def __init__(self) -> None:
        state = make_row_state(8, 1, CPU)
        self._inputs = HostInputs(state, block_size=16)
        self.sampler = Sampler(state.sampling, VOCAB, (EOS,), CPU)

    def start(self, start: RowStart) -> None:
        self._inputs.send(StepPlan(0, *(NO_INTS,) * 6, row_starts=(start,)))
        self.sampler.start(start)


def make_sampler(*params: SamplingParams, prompt=(1, 2), emitted=()) -> Rows:
    """One row for each parameter set, row i with seed i."""
    rows = Rows()
    for row, each in enumerate(params):
        rows.start(RowStart(row, row, len(prompt), each, tuple(prompt), tuple(emitted), len(emitted)))
    return rows


def step(state: Rows, logits: torch.Tensor, position: int, rows=(0,)):
    """Tokens, and log-probabilities where a row wants them, as a runner gets them."""
    sampler, indices = state.sampler, np.array(rows, np.int32)
    positions = np.full(len(rows), position, np.int32)
    tokens = sampler.sample(logits, torch.from_numpy(indices).long(), torch.from_numpy(positions).long())
    if sampler.has_logits_processors(indices):
        sampler.resample(logits, tokens, indices, positions)
    num_top = sampler.num_logprobs(indices)
    return tokens.tolist(), None if num_top is None else sampler.score(logits, tokens, num_top)


def greedy(**kwargs) -> SamplingParams:
    return SamplingParams(temperature=0.0, **kwargs)


def test_greedy_takes_the_likeliest():
    logits = torch.randn(1, VOCAB)
    assert step(make_sampler(greedy()), logits, 2)[0] == [int(logits.argmax())]


def test_logit_bias_is_added():
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 5.0
    assert step(make_sampler(greedy(logit_bias=((9, 4.0), (9, 2.0)))), logits, 2)[0] == [9]
    assert logits[0, 9] == 0.0, "the model's logits must stay as they are"


def test_allowed_token_ids_forbid_the_rest():
    logits = torch.arange(VOCAB).float().reshape(1, -1)
    assert step(make_sampler(greedy(allowed_token_ids=(4, 11, 6))), logits, 2)[0] == [11]


def test_bad_words_are_never_completed():
    logits = torch.zeros(1, VOCAB)
    logits[0, 5], logits[0, 6] = 2.0, 1.0
    sampler = make_sampler(greedy(bad_words=((2, 5), (6, 6, 6))), prompt=(1, 2))
    # 2 is last, so 5 would complete (2, 5); afterwards 5 is free again, until nothing is left to complete.
    assert [step(sampler, logits, 2 + i)[0][0] for i in range(3)] == [6, 5, 5]
    sampler = make_sampler(greedy(bad_words=((5,), (6, 6, 6))), prompt=(1,))
    chosen = [step(sampler, logits, 1 + i)[0][0] for i in range(4)]
    assert chosen[:2] == [6, 6]
    assert chosen[2] not in (5, 6)
    assert chosen[3] == 6


def test_min_tokens_holds_back_every_end():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 8], logits[0, 20] = 9.0, 8.0, 1.0
    sampler = make_sampler(greedy(min_tokens=2, stop_token_ids=(8,)), prompt=(1, 2))
    assert [step(sampler, logits, position)[0][0] for position in (2, 3, 4)] == [20, 20, EOS]


def test_penalties_follow_their_formulas():
    params = greedy(presence_penalty=0.4, frequency_penalty=0.3, repetition_penalty=1.5)
    prompt, emitted = [1, 2, 2], [7, 7, 9]
    sampler = make_sampler(params, prompt=prompt, emitted=emitted)
    generator = torch.Generator().manual_seed(0)
    history = list(emitted)
    for position in range(6, 26):
        logits = torch.randn(1, VOCAB, generator=generator)
        expected = []
        for v, logit in enumerate(logits[0].double().tolist()):
            if v in prompt or v in history:
                logit = logit / 1.5 if logit > 0 else logit * 1.5
            count = history.count(v)
            expected.append(logit - 0.3 * count - (0.4 if count else 0.0))
        [token], _ = step(sampler, logits, position)
        assert token == int(np.argmax(expected))
        history.append(token)


def test_rows_do_not_disturb_each_other():
    params = [
        SamplingParams(seed=1, temperature=0.8),
        SamplingParams(temperature=1.3, top_k=5, presence_penalty=1.0),
        greedy(),
        SamplingParams(temperature=1.0, top_p=0.6, logprobs=2),
    ]
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    together = step(make_sampler(*params), logits, 9, rows=(0, 1, 2, 3))[0]
    for row in range(4):
        assert step(make_sampler(*params), logits[row : row + 1], 9, rows=(row,))[0] == [together[row]]
    backwards = step(make_sampler(*params), logits.flip(0), 9, rows=(3, 2, 1, 0))[0]
    assert backwards == together[::-1]


def test_logprobs_are_those_of_the_models_own_logits():
    logits = torch.randn(1, VOCAB)
    tokens, scores = step(make_sampler(greedy(logit_bias=((5, 100.0),), logprobs=3)), logits, 2)
    assert scores is not None
    logprobs, ranks, top_ids, _ = scores
    assert tokens == [5]
    assert logprobs[0] == pytest.approx(float(logits.log_softmax(1)[0, 5]), abs=1e-5)
    assert ranks[0] == 1 + int((logits[0] > logits[0, 5]).sum())
    assert top_ids[0].tolist() == logits[0].topk(3).indices.tolist()


def test_a_restarted_row_forgets():
    sampler = make_sampler(greedy(logit_bias=((9, 100.0),)))
    logits = torch.zeros(1, VOCAB)
    logits[0, 4] = 1.0
    assert step(sampler, logits, 2)[0] == [9]
    sampler.start(RowStart(0, 0, 2, greedy()))
    assert step(sampler, logits, 2)[0] == [4]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_unusable_logits_fail_their_row_alone(poison):
    logits = torch.zeros(2, VOCAB)
    logits[1, 5] = poison
    tokens, _ = step(make_sampler(greedy(), greedy()), logits, 2, rows=(0, 1))
    assert tokens == [0, -1]


def test_a_row_with_every_token_forbidden_fails():
    params = greedy(allowed_token_ids=(EOS,), min_tokens=4)
    assert step(make_sampler(params), torch.zeros(1, VOCAB), 2)[0] == [-1]


class NeverTwice:
    """A logits processor that forbids the last token, known on the host."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.last: dict[int, int] = {}

    def start(self, start: RowStart) -> None:
        self.last[start.row] = start.prompt_token_ids[-1]

    def stop(self, row: int) -> None:
        self.last.pop(row, None)

    def __contains__(self, row: int) -> bool:
        return row in self.last

    def apply(self, logits: torch.Tensor, rows: Sequence[int], positions: Sequence[int]) -> None:
        for i, row in enumerate(rows):
            if row in self.last:
                logits[i, self.last[row]] = -float("inf")

    def accept(self, rows: Sequence[int], tokens: torch.Tensor) -> None: ...

    def observe(self, row: int, token_id: int) -> None:
        self.last[row] = token_id


NEVER_TWICE = ProcessorSpec(lambda: NeverTwice, lambda params: params.min_tokens > 0, needs_last_token=True)


def plan_of(starts: tuple[int, ...], *slices: tuple[int, ...]) -> StepPlan:
    """One slice for each row from 0 on."""
    rows = np.arange(len(slices), dtype=np.int32)
    num_tokens = np.array([len(each) for each in slices], np.int32)
    token_ids = np.array([token for each in slices for token in each], np.int32)
    return StepPlan(0, rows, np.array(starts, np.int32), num_tokens, token_ids, rows, rows)


def test_a_processor_reads_each_last_token_once():
    """By a step of one token, and by the chunk that a preempted sequence resumes with."""
    state = make_row_state(4, 1, CPU)
    sampler = Sampler(state.sampling, VOCAB, (EOS,), CPU, processors=(NEVER_TWICE,))
    assert sampler.reads_tokens
    for row, min_tokens in enumerate((1, 0)):
        sampler.start(RowStart(row, 0, 2, greedy(min_tokens=min_tokens), (1, 7)))
    logits, rows, positions = torch.zeros(2, VOCAB), np.array([0, 1], np.int32), np.array([2, 2])
    logits[:, 7], logits[:, 8] = 2.0, 1.0

    def tokens(plan: StepPlan) -> list[int]:
        sampler.read_tokens(plan)
        found = sampler.sample(logits, torch.tensor([0, 1]), torch.from_numpy(positions))
        sampler.resample(logits, found, rows, positions)
        return found.tolist()

    assert tokens(plan_of((0, 0), (1, 7), (1, 7))) == [8, 7], "the prompt's tokens are known by the start"
    assert tokens(plan_of((2, 2), (8,), (DEVICE_TOKEN,))) == [7, 7]
    assert tokens(plan_of((1, 3), (7, 8, 7), (DEVICE_TOKEN,))) == [8, 7]
    with pytest.raises(RuntimeError, match="row 0 has a logits processor that needs its last token"):
        sampler.read_tokens(plan_of((4, 4), (DEVICE_TOKEN,), (DEVICE_TOKEN,)))


def test_processors_are_those_of_the_list():
    sampler = Sampler(make_row_state(2, 1, CPU).sampling, VOCAB, (EOS,), CPU, processors=())
    sampler.start(RowStart(0, 0, 2, greedy(logit_bias=((9, 4.0),))))
    assert not sampler.has_logits_processors(np.array([0], np.int32))
    assert not sampler.reads_tokens
