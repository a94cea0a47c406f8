"""One rank's sampling: parameters by row, one pass over a step's logits.

`sample` reads nothing on the host, so it runs in the CUDA graph. `resample` handles rows with
logits processors outside it, with histories on the device.

Tensor-parallel ranks hold slices of the logits and sample the tokens of one rank with all logits.
Without filters (top-k, top-p, min-p) they exchange each slice's best token (sample_slice.py). With
filters each rank samples its share of rows from whole logits. Few such rows, and rows with logits
processors, are sampled on all ranks from gathered logits.
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
from ..host_copy import send_ints
from ..parallel.comm import ParallelContext
from ..parallel.vocabulary import VocabularySlice
from ..plan import DEVICE_TOKEN, Ints, RowStart, StepPlan
from ..protocol import SamplingParams
from . import processor_table
from .logits_processors import LastTokenReader, LogitsProcessor
from .processor_table import ProcessorSpec
from .slice_scores import score_slices

# An all-to-all of rows takes two exchanges, gathering one. On two H200, top-k 50 and top-p 0.9 of
# 128,256 tokens: one row 47 us by all-to-all and 34 gathered, 32 rows 87 and 119, 256 rows 333 and
# 647.
_FEW_ROWS = 4
# Sampling has separate kernels up to 8 rows and beyond (kernels/sampling/sample_triton.py).
_WARM_UP_ROWS = 16
NO_TOKEN = "the model gave no usable logits: they hold NaN or infinity, or the request forbids every token"


class Sampler:
    """Samples each sequence by its row's parameters in `params`, which the caller fills.

    Logits are [K, size], this rank's slice of the vocabulary; with one rank, all of it. processors:
    replace those of the table.
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
        # Split logits: steps with and without filters are two programs.
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
        self._num_known = np.zeros(num_rows, np.int64)  # tokens of the row's sequence that readers have received

    def start(self, start: RowStart) -> None:
        """Begin a sequence in a row and drop the previous state."""
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
        """Pass the rows' last tokens in `plan` to processors that need them."""
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
        """Whether logits are split and one of these rows has a filter."""
        return self.is_split and bool(self._filters[rows].any())

    def sample(
        self, logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, *, filtered: bool = False
    ) -> torch.Tensor:
        """Sample int64 [K] tokens of rows int64 [K] at positions int64 [K], from logits [K,
        size].

        -1 where a row's logits are unusable. Rows may repeat with different positions.
        Ignores logits processors; reads nothing on the host. filtered: the result of
        `has_filters`.
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
        return bool(self._processed_rows) and not self._processed_rows.isdisjoint(rows.tolist())

    def num_logprobs(self, rows: Ints) -> int | None:
        """The most top log-probabilities that these rows requested; None if no row did."""
        most = int(self._num_logprobs[rows].max(initial=-1))
        return None if most < 0 else most

    def resample(self, logits: torch.Tensor, tokens: torch.Tensor, rows: Ints, positions: np.ndarray) -> None:
        """Resample rows with logits processors and overwrite their entries in `tokens` [>=
        K].

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
        """Run the slow path for one row and for more; leaves penalties in the used rows."""
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
    narrows = 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
    return not params.greedy and narrows
