"""Sampling of one rank: parameters by row, one pass over the logits of a step.

The parameters of every row (temperature, top-k, ...) are tensors indexed by row. `sample` reads nothing on the host, so
it runs in the CUDA graph. Rows with logits processors are sampled again by `resample`, outside of the graph.
That needs no token on the host either: histories are on the device, where the next step may already wait for them.

Tensor-parallel ranks hold a slice of the logits each, and all of them sample the tokens that one rank with all logits
would. In most steps no row filters (top-k, top-p, min-p), and the ranks exchange the best token of each slice
(sample_slice.py). In a step with filters each rank samples its share of the rows from their whole logits. Few such
rows, and rows with logits processors, are sampled on all ranks alike, from gathered logits. Log-probabilities are
combined from each slice's sums (slice_scores.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch

from ...kernels.sampling.params import SamplingRows
from ...kernels.sampling.sample import sample_rows
from ...kernels.sampling.sample_slice import best_keys, winners
from ...kernels.sampling.score import Scores, score
from .. import processor_table
from ..host_copy import send_ints
from ..parallel.comm import ParallelContext
from ..parallel.vocabulary import VocabularySlice
from ..plan import DEVICE_TOKEN, Ints, RowStart, StepPlan
from ..processor_table import ProcessorSpec
from ..protocol import SamplingParams
from .logits_processors import LastTokenReader, LogitsProcessor
from .slice_scores import score_slices

# An all-to-all of the rows takes two exchanges, gathering them takes one. On two H200, top-k 50 and top-p 0.9 of
# 128,256 tokens: one row 47 us by all-to-all and 34 gathered, 32 rows 87 and 119, 256 rows 333 and 647.
_FEW_ROWS = 4
# Up to 8 rows and beyond, sampling has kernels of its own (kernels/sampling/sample_triton.py).
_WARM_UP_ROWS = 16
NO_TOKEN = "the model gave no usable logits: they hold NaN or infinity, or the request forbids every token"


class Sampler:
    """Samples the tokens of sequences, each by the parameters of its row in `params`, which the caller fills.

    Logits are [K, size], this rank's slice of the vocabulary; with one rank, all of it. processors: instead of
    those of the table.
    """

    def __init__(
        self,
        params: SamplingRows,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        comm: ParallelContext | None = None,
        processors: Sequence[ProcessorSpec] | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        comm = comm or ParallelContext()
        self._slice = VocabularySlice(vocab_size, comm)
        # Ranks have slices of the logits: steps with filters and steps without are two programs.
        self.is_split = comm.tp_size > 1 and comm.is_last_stage
        self._params = params
        num_rows = len(params.temperature)
        self._num_logprobs = np.full(num_rows, -1, np.int32)
        self._filters = np.zeros(num_rows, np.bool_)
        self._specs = processor_table.LOGITS_PROCESSORS if processors is None else processors
        self._processors: list[LogitsProcessor] = [
            spec.load()(vocab_size, eos_token_ids, device) for spec in self._specs
        ]
        self._processed_rows: set[int] = set()
        self._readers = [
            cast("LastTokenReader", processor)
            for spec, processor in zip(self._specs, self._processors, strict=True)
            if spec.needs_last_token
        ]
        self.reads_tokens = bool(self._readers)
        self._num_known = np.zeros(num_rows, np.int64)  # tokens of the row's sequence that readers know

    def start(self, start: RowStart) -> None:
        """Begin a sequence in a row and drop all state of the sequence before."""
        row, params = start.row, start.sampling
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._filters[row] = _filters(params, self.vocab_size)
        self._num_known[row] = start.prompt_len + start.num_emitted
        if row in self._processed_rows:
            self._processed_rows.remove(row)
            for processor in self._processors:
                processor.stop(row)
        for spec, processor in zip(self._specs, self._processors, strict=True):
            if spec.is_active(params):
                processor.start(start)
                self._processed_rows.add(row)

    def read_tokens(self, plan: StepPlan) -> None:
        """Pass the rows' last tokens, which `plan` names, to the processors that need them on the host."""
        for piece in plan.slices():
            offset = int(self._num_known[piece.row]) - piece.start
            readers = [reader for reader in self._readers if piece.row in reader]
            if not readers or not 0 <= offset < piece.num_tokens:
                continue
            token = piece.token_ids[offset]
            if token == DEVICE_TOKEN:
                raise RuntimeError(f"row {piece.row} has a logits processor that needs its last token on the host")
            self._num_known[piece.row] += 1
            for reader in readers:
                reader.observe(piece.row, token)

    def has_filters(self, rows: Ints) -> bool:
        """Whether the step needs the program for filters: logits are split, and one of these rows has one."""
        return self.is_split and bool(self._filters[rows].any())

    def sample(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, *, filtered: bool = False
    ) -> torch.Tensor:
        """Tokens int64 [K] of rows int64 [K] for positions int64 [K] of their sequences, from logits [K, size].

        -1 where a row's logits are unusable. A row may occur several times, with different positions. Without logits
        processors; reads nothing on the host. filtered: the result of `has_filters`.
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
        """Whether one of these rows has a logits processor."""
        return bool(self._processed_rows) and not self._processed_rows.isdisjoint(rows.tolist())

    def num_logprobs(self, rows: Ints) -> int | None:
        """The most top log-probabilities that one of these rows asked for; None if no row asked for any."""
        most = int(self._num_logprobs[rows].max(initial=-1))
        return None if most < 0 else most

    def resample(self, logits: torch.Tensor, tokens: torch.Tensor, rows: Ints, positions: np.ndarray) -> None:
        """Sample rows with logits processors again and overwrite their entries in `tokens` [>= K].

        logits [>= K, size] stay unchanged. positions [K] as in `sample`.
        """
        indices = [k for k, row in enumerate(rows.tolist()) if row in self._processed_rows]
        own_rows, own_positions = rows[indices].tolist(), positions[indices].tolist()
        index = send_ints(indices, self.device)
        processed = self._slice.whole(logits.index_select(0, index)).float()
        processors = [one for one in self._processors if any(row in one for row in own_rows)]
        for processor in processors:
            processor.apply(processed, own_rows, own_positions)
        sampled = sample_rows(
            processed, send_ints(own_rows, self.device), self._params, send_ints(own_positions, self.device)
        )
        tokens.index_copy_(0, index, sampled)
        for processor in processors:
            processor.accept(own_rows, sampled)

    def warm_up(self, logits: torch.Tensor) -> None:
        """Run the slow path once for one row and once for more. Leaves penalties in the rows that it used."""
        most = min(_WARM_UP_ROWS, len(logits))
        tokens, positions = torch.zeros(most, dtype=torch.int64, device=self.device), np.zeros(most, np.int64)
        for row in range(most):
            self.start(RowStart(row, 0, 1, SamplingParams(presence_penalty=1.0), prompt_token_ids=(0,)))
        for count in (1, most):
            rows = np.arange(count, dtype=np.int32)
            self.resample(logits[:count], tokens[:count], rows, positions[:count])
            self.score(logits[:count], tokens[:count], 1)

    def score(self, logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> Scores:
        """`kernels.sampling.score.score` of token_ids int64 [P], under the logits [P, size] of all ranks."""
        num_top = min(num_top, self.vocab_size)
        if self.is_split:
            return score_slices(logits, token_ids, num_top, self._slice)
        return score(logits, token_ids, num_top)


def _filters(params: SamplingParams, vocab_size: int) -> bool:
    """Whether a row with these parameters samples from less than the whole vocabulary."""
    narrows = 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
    return not params.greedy and narrows
