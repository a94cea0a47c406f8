"""One rank's work: from a step plan to its tokens.

The runner keeps what a plan only names: the block table, the last token and the sampling parameters of every row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .batch import AttentionMetadata, InputBatch
from .config import EngineConfig, ModelFacts
from .kv_cache import KVCache
from .models.decoder import DecoderModel
from .plan import DEVICE_TOKEN, LogprobArrays, StepPlan, StepResult
from .sampler import Sampler, score_arrays

# Prompt log-probabilities need logits of every position; this many are held at a time.
_SCORED_CHUNK = 256


class Runner:
    """Executes plans in order on one device."""

    def __init__(
        self,
        model: DecoderModel,
        kv_cache: KVCache,
        config: EngineConfig,
        facts: ModelFacts,
        device: torch.device,
    ) -> None:
        assert config.model.max_model_len is not None
        assert config.cache.block_size is not None
        self.model = model
        self.kv_cache = kv_cache
        self.device = device
        self.block_size = config.cache.block_size
        max_rows = config.scheduler.max_num_seqs
        self._block_tables = np.zeros((max_rows, -(-config.model.max_model_len // self.block_size)), np.int32)
        self._last_tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._num_prompt_logprobs = np.zeros(max_rows, np.int32)
        self._sampler = Sampler(max_rows, facts.vocab_size, facts.eos_token_ids, device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its tokens."""
        for start in plan.row_starts:
            self._sampler.start(start)
            self._num_prompt_logprobs[start.row] = start.sampling.prompt_logprobs or 0
        self._block_tables[plan.table_rows, plan.table_indices] = plan.table_blocks
        if plan.copies:
            self.kv_cache.copy_blocks(plan.copies)
        batch = self.prepare(plan)
        hidden = self.model(batch.input_ids, batch.positions, batch.attention, self.kv_cache)
        prompt_logprobs = self._score_prompts(plan, hidden)
        if len(plan.sample_rows) == 0:
            return StepResult(plan.step, np.empty(0, np.int32), prompt_logprobs=prompt_logprobs)
        logits = self.model.compute_logits(hidden.index_select(0, batch.sample_indices))
        positions = (plan.starts + plan.num_tokens)[plan.sample_slices]
        tokens, logprobs, failed = self._sampler.sample(logits, plan.sample_rows, positions)
        self._last_tokens.index_copy_(0, self._to_device(plan.sample_rows.astype(np.int64)), tokens)
        return StepResult(plan.step, tokens.to("cpu", torch.int32).numpy(), logprobs, prompt_logprobs, failed)

    def prepare(self, plan: StepPlan) -> InputBatch:
        """The tensors of a step. Host work in numpy, then one copy of each array to the device."""
        num_tokens = plan.num_tokens
        ends = np.cumsum(num_tokens)
        context_lens = plan.starts + num_tokens
        if int(ends[-1]) == plan.num_slices:  # pure decode
            token_rows, positions = plan.rows, plan.starts
            num_decodes = plan.num_slices
        else:
            token_rows = np.repeat(plan.rows, num_tokens)
            offsets = np.arange(ends[-1]) - np.repeat(ends - num_tokens, num_tokens)
            positions = np.repeat(plan.starts, num_tokens) + offsets
            num_decodes = int((num_tokens == 1).sum())
            assert (num_tokens[:num_decodes] == 1).all(), "slices of one token come first"
        blocks = self._block_tables[token_rows, positions // self.block_size]
        slots = blocks.astype(np.int64) * self.block_size + positions % self.block_size
        tables = self._block_tables[plan.rows, : -(-int(context_lens.max()) // self.block_size)]
        lens = context_lens.astype(np.int32)
        prefill_starts = np.concatenate(([num_decodes], ends[num_decodes:])).astype(np.int32)
        attention = AttentionMetadata(
            slot_mapping=self._to_device(slots),
            decode_lens=self._to_device(lens[:num_decodes]),
            decode_tables=self._to_device(tables[:num_decodes]),
            prefill_starts=self._to_device(prefill_starts),
            prefill_lens=self._to_device(lens[num_decodes:]),
            prefill_tables=self._to_device(tables[num_decodes:]),
        )
        return InputBatch(
            input_ids=self._input_ids(plan, token_rows),
            positions=self._to_device(positions.astype(np.int64)),
            attention=attention,
            sample_indices=self._to_device((ends - 1)[plan.sample_slices]),
        )

    def _input_ids(self, plan: StepPlan, token_rows: np.ndarray) -> Tensor:
        unknown = np.flatnonzero(plan.token_ids == DEVICE_TOKEN)
        if len(unknown) == len(plan.token_ids):
            return self._last_tokens.index_select(0, self._to_device(token_rows))
        input_ids = self._to_device(plan.token_ids.astype(np.int64))
        if len(unknown):
            input_ids[self._to_device(unknown)] = self._last_tokens[self._to_device(token_rows[unknown])]
        return input_ids

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> tuple[LogprobArrays, ...]:
        if len(plan.scored_slices) == 0:
            return ()
        ends = np.cumsum(plan.num_tokens)
        scored = []
        for index, following in zip(plan.scored_slices.tolist(), plan.scored_next.tolist(), strict=True):
            first, end = int(ends[index] - plan.num_tokens[index]), int(ends[index])
            targets = plan.token_ids[first + 1 : end].tolist()
            if following != DEVICE_TOKEN:
                targets.append(following)
            num_top = int(self._num_prompt_logprobs[plan.rows[index]])
            scored.append(self._score_positions(hidden[first : first + len(targets)], targets, num_top))
        return tuple(scored)

    def _score_positions(self, hidden: Tensor, targets: list[int], num_top: int) -> LogprobArrays:
        target_ids = torch.tensor(targets, dtype=torch.int64, device=self.device)
        parts = [
            score_arrays(self.model.compute_logits(some), ids, num_top)
            for some, ids in zip(hidden.split(_SCORED_CHUNK), target_ids.split(_SCORED_CHUNK), strict=True)
        ]
        return LogprobArrays(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
            top_ids=np.concatenate([part.top_ids for part in parts]),
            top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
        )

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)
