"""Sampling as a shard does it: parameters kept by row, one pass over the logits of a step.

What every sequence has (temperature, top-k, ...) lies in arrays indexed by row and costs a gather. What few have
(logit bias, penalties, forbidden words, ...) is an object per row, applied to that row's logits alone, and needs no
token on the host: histories are kept on the device, where the next step may already be waiting for them.
"""

from __future__ import annotations

import numpy as np
import torch

from ..kernels.sample import sample, score
from .plan import Ints, LogprobArrays, RowStart

_NEVER = float("-inf")


class Sampler:
    """Chooses the tokens of up to `max_rows` sequences, each by the parameters its row was started with."""

    def __init__(self, max_rows: int, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.device = device
        self._temperature = np.zeros(max_rows, np.float32)
        self._top_p = np.ones(max_rows, np.float32)
        self._min_p = np.zeros(max_rows, np.float32)
        self._top_k = np.zeros(max_rows, np.int64)
        self._seed = np.zeros(max_rows, np.int64)
        self._filtered = np.zeros(max_rows, bool)
        self._num_logprobs = np.full(max_rows, -1, np.int32)
        self._adjusters: dict[int, LogitAdjuster] = {}

    def start(self, start: RowStart) -> None:
        """Begin a sequence in a row; whatever the row held before is forgotten."""
        row, params = start.row, start.sampling
        self._temperature[row] = params.temperature
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._top_k[row] = params.top_k
        self._seed[row] = np.uint64(start.seed).astype(np.int64)
        self._filtered[row] = params.top_p < 1.0 or params.min_p > 0.0 or 0 < params.top_k < self.vocab_size
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._adjusters.pop(row, None)
        if LogitAdjuster.needed(start):
            self._adjusters[row] = LogitAdjuster(start, self.vocab_size, self.eos_token_ids, self.device)

    def sample(
        self, logits: torch.Tensor, rows: Ints, positions: np.ndarray
    ) -> tuple[torch.Tensor, LogprobArrays | None, tuple[tuple[int, str], ...]]:
        """Tokens int64 [K] for `rows` [K], to stand at `positions` [K] of their sequences.

        logits: float32 [K, V]. Also returns the log-probabilities of all K tokens if any row wants them, and
        (row, message) of each row that has no token to choose from; its token is meaningless.
        """
        raw = logits
        adjusted = [(k, self._adjusters[row]) for k, row in enumerate(rows.tolist()) if row in self._adjusters]
        if adjusted:
            logits = logits.clone()
            for k, adjuster in adjusted:
                adjuster.apply(logits[k], int(positions[k]))
        if not self._temperature[rows].any():
            tokens = logits.argmax(dim=1)
        else:
            tokens = sample(
                logits,
                self._gather(self._temperature, rows),
                self._gather(self._top_k, rows),
                self._gather(self._top_p, rows),
                self._gather(self._min_p, rows),
                self._gather(self._seed, rows),
                torch.from_numpy(positions.astype(np.int64)).to(self.device),
                filtered=bool(self._filtered[rows].any()),
            )
        for k, adjuster in adjusted:
            adjuster.append(tokens[k])
        return tokens, self._score(raw, tokens, rows), _failures(logits, rows)

    def _gather(self, values: np.ndarray, rows: Ints) -> torch.Tensor:
        return torch.from_numpy(values[rows]).to(self.device, non_blocking=True)

    def _score(self, raw: torch.Tensor, tokens: torch.Tensor, rows: Ints) -> LogprobArrays | None:
        num_top = int(self._num_logprobs[rows].max(initial=-1))
        return None if num_top < 0 else score_arrays(raw, tokens, num_top)


def score_arrays(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobArrays:
    """`kernels.sample.score`, brought to the host."""
    logprobs, ranks, top_ids, top_logprobs = score(logits, token_ids, min(num_top, logits.shape[1]))
    return LogprobArrays(
        token_ids=token_ids.to("cpu", torch.int32).numpy(),
        logprobs=logprobs.cpu().numpy(),
        ranks=ranks.to("cpu", torch.int32).numpy(),
        top_ids=top_ids.to("cpu", torch.int32).numpy(),
        top_logprobs=top_logprobs.cpu().numpy(),
    )


def _failures(logits: torch.Tensor, rows: Ints) -> tuple[tuple[int, str], ...]:
    # A maximum is NaN if any logit is, and -inf if every token is forbidden: one reduction finds both.
    usable = np.isfinite(logits.amax(dim=1).cpu().numpy())
    if usable.all():
        return ()
    message = "the model gave no usable logits: they hold NaN or infinity, or the request forbids every token"
    return tuple((int(row), message) for row, ok in zip(rows, usable.tolist(), strict=True) if not ok)


class LogitAdjuster:
    """The uncommon wishes of one sequence: bias, allowed tokens, forbidden words, min_tokens and penalties."""

    def __init__(self, start: RowStart, vocab_size: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        params = start.sampling
        self._params = params
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
        self._words = [torch.tensor(word, dtype=torch.int64, device=device) for word in params.bad_words]
        longest = max((len(word) for word in params.bad_words), default=1) - 1
        # The last `longest` tokens; -1, which no token equals, where the sequence is still shorter.
        self._tail = torch.full((longest,), -1, dtype=torch.int64, device=device)
        if longest and len(history):
            known = history[-longest:]
            self._tail[longest - len(known) :] = known
        self._counts: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            emitted = history[len(start.prompt_token_ids) :]
            self._counts = torch.bincount(emitted, minlength=vocab_size).float()
            self._seen = torch.bincount(history, minlength=vocab_size) > 0

    @staticmethod
    def needed(start: RowStart) -> bool:
        params = start.sampling
        return bool(params.logit_bias or params.allowed_token_ids or params.min_tokens or params.uses_history)

    def apply(self, logits: torch.Tensor, position: int) -> None:
        """Change `logits` [V] in place, for the token at `position` of the sequence."""
        if len(self._bias):
            logits.index_add_(0, self._bias_ids, self._bias)
        if self._forbidden is not None:
            logits.masked_fill_(self._forbidden, _NEVER)
        for word in self._words:
            prefix = word[:-1]
            completes = (self._tail[len(self._tail) - len(prefix) :] == prefix).all()
            logits[word[-1]] = torch.where(completes, _NEVER, logits[word[-1]])
        if len(self._ends) and position < self._min_position:
            logits[self._ends] = _NEVER
        if self._counts is not None:
            params = self._params
            penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            torch.where(self._seen, penalised, logits, out=logits)
            logits.sub_(params.frequency_penalty * self._counts)
            logits.sub_(params.presence_penalty * (self._counts > 0).float())

    def append(self, token: torch.Tensor) -> None:
        """Note the token that was chosen (an int64 scalar on the device)."""
        if len(self._tail):
            self._tail = torch.cat((self._tail[1:], token.reshape(1)))
        if self._counts is not None:
            self._counts.index_add_(0, token.reshape(1), torch.ones(1, device=token.device))
            self._seen.index_fill_(0, token.reshape(1), True)
