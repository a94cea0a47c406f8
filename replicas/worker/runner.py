"""One rank's work: from a step plan to its tokens.

`Runner.launch` queues these events; a GPU runs them in order.

1. start     reset rows of new sequences, send the packed plan, copy KV blocks; a pipeline stage
             receives hidden states or, the first one, tokens
2. forward   in a CUDA graph if one fits, else kernel by kernel: plan -> tensors, layers, output
             head, `Sampler.sample` for all rows, `store_sampled_tokens`
3. resample  outside the graph: rows with logits processors only
4. score     outside the graph, on request: log-probabilities of the samples
5. send      a pipeline stage sends its hidden states or, the last one, the tokens
6. fetch     copy the sampled tokens to the host
7. prompts   prompt log-probabilities, only of steps without a graph

The next step may be launched before the host reads this one's tokens, because tokens stay on the
device (`RowState.last_tokens`). Only the last pipeline stage samples: 3, 4, 6, 7 and half of 2.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from ...kernels.backend import Backend, backend_of
from ..config import ModelFacts, ResolvedConfig
from ..host_copy import HostCopier, HostCopy
from ..layers.batch import GraphShape, StepOutputs
from ..layers.kv_cache import KVCache
from ..models.decoder import DecoderModel
from ..plan import DEVICE_TOKEN, StepPlan, StepResult
from ..sampling.sampler import Sampler
from .device_inputs import DeviceInputs
from .graphs import StepGraphs
from .pending_step import PendingStep
from .stage_exchange import make_exchange
from .step_inputs import HostInputs, StepInputs, make_row_state, shape_of

# Prompt log-probabilities need logits of every position; at most this many rows exist at a time.
_SCORED_CHUNK = 256


class Runner:
    """Executes plans in order on one device.

    Keeps block table, last token and sampling parameters by row. An extra row takes the samples
    of padding.
    """

    def __init__(
        self, model: DecoderModel, kv_cache: KVCache, config: ResolvedConfig, facts: ModelFacts, device: torch.device
    ) -> None:
        self.max_tokens, in_flight = config.scheduler.max_num_batched_tokens, config.scheduler.max_steps_in_flight
        block_size, self.max_rows = kv_cache.block_size, config.scheduler.max_num_seqs
        self.model, self.kv_cache, self.device = model, kv_cache, device
        state = make_row_state(self.max_rows + 1, -(-config.model.max_model_len // block_size), device)
        self.sampler = Sampler(state.sampling, facts.vocab_size, facts.eos_token_ids, device, model.comm)
        self.samples = model.comm.is_last_stage
        self.graphs = StepGraphs(device)
        self._num_prompt_logprobs = np.zeros(self.max_rows, np.int32)
        self._copier = HostCopier(device)
        self._inputs: StepInputs
        if backend_of(state.last_tokens) is Backend.TORCH:
            self._inputs = HostInputs(state, block_size)
        else:
            self._inputs = DeviceInputs(state, block_size, self.max_tokens, in_flight + 1)
        self._exchange = make_exchange(model.comm, state.last_tokens, self.max_tokens, facts.hidden_size, model.dtype)
        # At a fixed address for CUDA graphs.
        self.sampled_states = torch.zeros(self.max_rows, facts.hidden_size, dtype=model.dtype, device=device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue one step; on a CPU it has run when this returns."""
        if self.samples:
            self._start_rows(plan)
            if self.sampler.reads_tokens:
                self.sampler.read_tokens(plan)
        self._inputs.send(plan)
        if plan.copies:
            self.kv_cache.copy_blocks(plan.copies)
        if self._exchange is not None:
            self._exchange.recv_before_step(plan)
        scores_prompts = self.samples and len(plan.scored_slices) > 0
        shape = shape_of(plan)
        if self.sampler.has_filters(plan.sample_rows):
            shape = replace(shape, filtered=True)
        outputs = None if scores_prompts else self.graphs.replay(shape)
        if outputs is None:
            outputs = self.forward(shape)
        count, scores = 0, None
        if self.samples and len(plan.sample_rows):
            count, scores = len(plan.sample_rows), self._resample_and_score(plan, outputs)
        if self._exchange is not None:
            self._exchange.send_after_step(plan)
        pending = PendingStep(plan, self._inputs.fetch_sampled_tokens(count), scores)
        if scores_prompts:
            assert outputs.hidden is not None, "such a step runs outside of graphs"
            pending.prompt_scores = self._score_prompts(plan, outputs.hidden)
        return pending

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its tokens and other pipeline stages."""
        pending = self.launch(plan)
        self.synchronize()
        return pending.result()

    def synchronize(self) -> None:
        """Wait until no other stage needs data of the steps so far."""
        if self._exchange is not None:
            self._exchange.synchronize()

    @torch.inference_mode()
    def forward(self, shape: GraphShape) -> StepOutputs:
        """Run one step of the last sent plan. CUDA graphs capture it; `shape` is the only host value it reads."""
        batch, exchange = self._inputs.batch(shape), self._exchange
        incoming = None if exchange is None else exchange.incoming(shape.tokens)
        hidden = self.model(batch.input_ids, batch.positions, batch.attention, self.kv_cache, incoming)
        if exchange is not None and not self.samples:
            exchange.stage_output(hidden)
            no_rows = batch.sample_rows[:0]
            return StepOutputs(None, None, self.sampled_states[:0], no_rows, no_rows)
        sampled = self.sampled_states[: shape.samples]
        torch.index_select(hidden, 0, batch.sample_indices, out=sampled)
        tokens, logits = batch.sample_rows, None
        if shape.samples:
            logits = self.model.compute_logits(sampled)
            tokens = self.sampler.sample(logits, batch.sample_rows, batch.sample_positions, filtered=shape.filtered)
            self._inputs.store_sampled_tokens(tokens, batch.sample_rows)
        return StepOutputs(hidden, logits, sampled, batch.sample_rows, tokens)

    def _start_rows(self, plan: StepPlan) -> None:
        for start in plan.row_starts:
            self.sampler.start(start)
            self._num_prompt_logprobs[start.row] = start.sampling.prompt_logprobs or 0

    def _resample_and_score(self, plan: StepPlan, outputs: StepOutputs) -> HostCopy | None:
        num_top = self.sampler.num_logprobs(plan.sample_rows)
        resamples = self.sampler.has_logits_processors(plan.sample_rows)
        if num_top is None and not resamples:
            return None
        logits = outputs.logits
        if logits is None:  # after a graph: the same GEMM in the same shape gives the same bits
            logits = self.model.compute_logits(outputs.sampled)
        if resamples:
            positions = (plan.starts + plan.num_tokens)[plan.sample_slices]
            self.sampler.resample(logits, outputs.tokens, plan.sample_rows, positions)
            self._inputs.store_sampled_tokens(outputs.tokens, outputs.rows)
        if num_top is None:
            return None
        count = len(plan.sample_rows)
        return self._copier.start(
            list(self.sampler.score(logits[:count], outputs.tokens[:count].clamp(min=0), num_top))
        )

    def _score_prompts(self, plan: StepPlan, hidden: torch.Tensor) -> list[tuple[np.ndarray, HostCopy]]:
        ends = np.cumsum(plan.num_tokens)
        scored = []
        for index, following in zip(plan.scored_slices.tolist(), plan.scored_next.tolist(), strict=True):
            first, end = int(ends[index] - plan.num_tokens[index]), int(ends[index])
            targets = plan.token_ids[first + 1 : end]
            if following != DEVICE_TOKEN:
                targets = np.append(targets, np.int32(following))
            num_top = int(self._num_prompt_logprobs[plan.rows[index]])
            states = hidden[first : first + len(targets)]
            scored.append((targets, self._copier.start(self._score_positions(states, targets, num_top))))
        return scored

    def _score_positions(self, hidden: torch.Tensor, targets: np.ndarray, num_top: int) -> list[torch.Tensor]:
        target_ids = torch.from_numpy(targets.astype(np.int64)).to(self.device)
        parts = [
            self.sampler.score(self.model.compute_logits(some), ids, num_top)
            for some, ids in zip(hidden.split(_SCORED_CHUNK), target_ids.split(_SCORED_CHUNK), strict=True)
        ]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
