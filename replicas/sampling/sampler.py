"""Sampling as a shard does it: parameters kept by row, one pass over the logits of a step.

What every sequence has (temperature, top-k, ...) lies in tensors indexed by row, and choosing by it never leaves the
device. What few have (logit bias, penalties, forbidden words, ...) is an object per row: those rows choose a second
time, from logits changed as they wish. That needs no token on the host either: histories are kept on the device, where
the next step may already be waiting for them.

Where tensor-parallel ranks have a slice of the logits each, all of them come to the same tokens, those of the whole. In
most steps no row filters, and the ranks exchange the best token of each slice (sample_slice.py). In a step with
top-k, top-p or min-p they share the rows out, and each chooses for its rows from the whole of their logits. A few rows,
and those with wishes, choose on all ranks alike from the whole of theirs. Log-probabilities add up (slice_scores.py).
"""

from __future__ import annotations

import numpy as np
import torch

from ...kernels.sampling.sample import SamplingRows, sample_rows
from ...kernels.sampling.sample_slice import best_keys, winners
from ...kernels.sampling.score import Scores, score
from ..host_copy import send_ints
from ..parallel.comm import ParallelContext
from ..parallel.vocabulary import VocabularySlice
from ..plan import Ints, RowStart
from ..protocol import SamplingParams
from .penalty_rows import PenaltyRows
from .slice_scores import score_slices

_NEVER = float("-inf")
# Sharing out takes two exchanges, gathering one. On two H200, top-k 50 and top-p 0.9 of 128,256 tokens: one row 47 us
# shared out and 34 gathered, 32 rows 87 and 119, 256 rows 333 and 647.
_FEW_ROWS = 4
# Up to 8 rows and beyond, sampling has kernels of its own (kernels/sampling/sample_triton.py).
_WARM_UP_ROWS = 16
NO_TOKEN = "the model gave no usable logits: they hold NaN or infinity, or the request forbids every token"


class Sampler:
    """Chooses the tokens of sequences, each by the parameters of its row in `params`, which is kept by others.

    Logits that it is given are those of the rank's slice of the vocabulary; with one rank, [K, V], of all of it.
    """

    def __init__(
        self,
        params: SamplingRows,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        comm: ParallelContext | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.device = device
        comm = comm or ParallelContext()
        self._slice = VocabularySlice(vocab_size, comm)
        # Ranks have slices of the logits, so that steps with filters and steps without are two programs.
        self.is_split = comm.tp_size > 1 and comm.is_last_stage
        self._params = params
        self._num_logprobs = np.full(len(params.temperature), -1, np.int32)
        self._filters = np.zeros(len(params.temperature), np.bool_)
        self._penalties = PenaltyRows(vocab_size, device)
        self._adjusters: dict[int, LogitAdjuster] = {}

    def start(self, start: RowStart) -> None:
        """Begin a sequence in a row; whatever the row held before is forgotten."""
        row, params = start.row, start.sampling
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._filters[row] = _filters(params, self.vocab_size)
        self._penalties.start(start)
        self._adjusters.pop(row, None)
        if LogitAdjuster.needed(start):
            self._adjusters[row] = LogitAdjuster(start, self.vocab_size, self.eos_token_ids, self.device)

    def has_filters(self, rows: Ints) -> bool:
        """Whether one of these rows draws from less than the whole vocabulary, and that makes a difference here."""
        return self.is_split and bool(self._filters[rows].any())

    def sample(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, *, filtered: bool = False
    ) -> torch.Tensor:
        """Tokens int64 [K] of rows int64 [K] for positions int64 [K] of their sequences, from logits [K, size].

        Uncommon wishes are left out; -1 where a row's logits are of no use. No value is read on the host.
        filtered: what `has_filters` said.
        """
        if not self.is_split:
            return sample_rows(logits, rows, self._params, positions)
        own = self._slice
        if filtered and len(rows) <= _FEW_ROWS:
            return sample_rows(own.whole(logits), rows, self._params, positions)
        if filtered:
            tokens = sample_rows(own.deal(logits), own.dealt(rows, -1), self._params, own.dealt(positions, 0))
            return own.collect(tokens, len(rows))
        keys = own.comm.all_gather(best_keys(logits, rows, self._params, positions, own.first))
        return winners(keys.view(own.comm.tp_size, len(rows)))

    def has_logits_processors(self, rows: Ints) -> bool:
        """Whether one of these rows has an uncommon wish."""
        if not self._adjusters and not self._penalties:
            return False
        return any(row in self._adjusters or row in self._penalties for row in rows.tolist())

    def num_logprobs(self, rows: Ints) -> int | None:
        """The most alternatives whose log-probabilities one of these rows wants; None if none wants any."""
        most = int(self._num_logprobs[rows].max(initial=-1))
        return None if most < 0 else most

    def resample(self, logits: torch.Tensor, tokens: torch.Tensor, rows: Ints, positions: np.ndarray) -> None:
        """Rows with uncommon wishes choose by them; their tokens are put in place, in `tokens` [>= K].

        logits [>= K, size] stay as they are. positions [K] as in `sample`.
        """
        wishing = [k for k, row in enumerate(rows.tolist()) if row in self._adjusters or row in self._penalties]
        row_ids = rows[wishing].tolist()
        index = send_ints(wishing, self.device)
        adjusted = self._slice.whole(logits.index_select(0, index)).float()
        adjusters = [(i, self._adjusters[row]) for i, row in enumerate(row_ids) if row in self._adjusters]
        for i, adjuster in adjusters:
            adjuster.apply(adjusted[i], int(positions[wishing[i]]))
        slots = self._penalties.slots(row_ids) if self._penalties else None
        if slots is not None:
            self._penalties.apply(adjusted, slots)
        chosen = sample_rows(
            adjusted,
            send_ints(row_ids, self.device),
            self._params,
            send_ints(positions[wishing].tolist(), self.device),
        )
        tokens.index_copy_(0, index, chosen)
        if slots is not None:
            self._penalties.count(slots, chosen)
        for i, adjuster in adjusters:
            adjuster.append(chosen[i])

    def warm_up(self, logits: torch.Tensor) -> None:
        """Do once, for few rows and for more, what only some requests ask for. Leaves penalties behind."""
        most = min(_WARM_UP_ROWS, len(logits))
        tokens, positions = torch.zeros(most, dtype=torch.int64, device=self.device), np.zeros(most, np.int64)
        for row in range(most):
            self.start(RowStart(row, 0, 1, SamplingParams(presence_penalty=1.0), prompt_token_ids=(0,)))
        for count in (1, most):
            rows = np.arange(count, dtype=np.int32)
            self.resample(logits[:count], tokens[:count], rows, positions[:count])
            self.score(logits[:count], tokens[:count], 1)

    def score(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Scores:
        """`kernels.score.score` of token_ids int64 [P] under logits [P, size] of all ranks."""
        num_top = min(num_top, self.vocab_size)
        if self.is_split:
            return score_slices(logits, token_ids, num_top, self._slice)
        return score(logits, token_ids, num_top)


def _filters(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a row with these parameters draws from less than the whole vocabulary."""
    narrows = 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
    return not params.greedy and narrows


class LogitAdjuster:
    """The uncommon wishes of one sequence that are not penalties: bias, allowed tokens, forbidden words, min_tokens."""

    def __init__(self, start: RowStart, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        params = start.sampling
        self._min_position = start.prompt_len + params.min_tokens
        # ignore_eos lets a sequence run through its end-of-sequence token; min_tokens keeps it from being chosen.
        ends = (*eos_token_ids, *params.stop_token_ids) if params.min_tokens else ()
        self._ends = torch.tensor(ends, dtype=torch.int64, device=device)
        self._bias_ids = torch.tensor([i for i, _ in params.logit_bias], dtype=torch.int64, device=device)
        self._bias = torch.tensor([b for _, b in params.logit_bias], dtype=torch.float32, device=device)
        self._forbidden: torch.Tensor | None = None
        if params.allowed_token_ids:
            self._forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self._forbidden[torch.tensor(params.allowed_token_ids, dtype=torch.int64, device=device)] = False
        history = torch.tensor(start.prompt_token_ids + start.emitted_token_ids, dtype=torch.int64, device=device)
        # What comes before a word's last token, and that token, on the host: one on the device would be read back.
        self._words = [
            (torch.tensor(word[:-1], dtype=torch.int64, device=device), word[-1]) for word in params.bad_words
        ]
        longest = max((len(word) for word in params.bad_words), default=1) - 1
        # The last `longest` tokens; -1, which no token equals, where the sequence is still shorter.
        self._tail = torch.full((longest,), -1, dtype=torch.int64, device=device)
        if longest and len(history):
            known = history[-longest:]
            self._tail[longest - len(known) :] = known

    @staticmethod
    def needed(start: RowStart) -> bool:
        params = start.sampling
        return bool(params.logit_bias or params.allowed_token_ids or params.min_tokens or params.bad_words)

    def apply(self, logits: torch.Tensor, position: int) -> None:
        """Change `logits` [V] in place, for the token at `position` of the sequence."""
        if len(self._bias):
            logits.index_add_(0, self._bias_ids, self._bias)
        if self._forbidden is not None:
            logits.masked_fill_(self._forbidden, _NEVER)
        for prefix, last in self._words:
            completes = (self._tail[len(self._tail) - len(prefix) :] == prefix).all()
            logits[last] = torch.where(completes, _NEVER, logits[last])
        if len(self._ends) and position < self._min_position:
            logits[self._ends] = _NEVER

    def append(self, token: torch.Tensor) -> None:
        """Note the token that was chosen (an int64 scalar on the device)."""
        if len(self._tail):
            self._tail = torch.cat((self._tail[1:], token.reshape(1)))
