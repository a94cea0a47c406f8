"""One rank's work: from a step plan to its tokens.

`launch` queues a step on the device and returns; the step after it may be launched before anything of the first is
read. The tokens that the next step needs stay on the device. Of a pipeline's stages the last one samples.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from weakref import proxy

import numpy as np
import torch
from torch import Tensor

from ...kernels.backend import Backend, backend_of
from ...kernels.compiling.compile_process import CompilationFailed, CompileProcess
from ..config import ModelFacts, ResolvedConfig
from ..device import usable_cores
from ..host_copy import HostCopier, HostCopy
from ..layers.batch import GraphShape
from ..layers.kv_cache import KVCache
from ..models.decoder import DecoderModel
from ..plan import DEVICE_TOKEN, LogprobArrays, StepPlan, StepResult
from ..sampling.sampler import NO_TOKEN, Sampler
from .device_inputs import DeviceInputs
from .graphs import StepGraphs, decode_shapes, mixed_shapes, with_filtered
from .stage_exchange import make_exchange
from .step_inputs import HostInputs, StepInputs, make_row_state, shape_of

logger = logging.getLogger(__name__)

# Prompt log-probabilities need logits of every position; this many are held at a time.
_SCORED_CHUNK = 256


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What one forward leaves: of T tokens, K of them sampled from, which is none before the last stage."""

    hidden: Tensor | None  # [T, hidden]; None, as logits, where a graph may have used its memory again
    logits: Tensor | None  # [K, size] of the rank's slice of the vocabulary
    sampled: Tensor  # [K, hidden], the states that were sampled from
    rows: Tensor  # int64 [K]
    tokens: Tensor  # int64 [K], -1 where there was none to choose


@dataclass(slots=True)
class PendingStep:
    """A launched step, until its result is asked for."""

    plan: StepPlan
    tokens: HostCopy
    scores: HostCopy | None = None  # of the sampled tokens
    prompt_scores: list[tuple[np.ndarray, HostCopy]] = field(default_factory=list)  # the token ids scored, and theirs

    def result(self) -> StepResult:
        """Waits for the step. Its tokens are those of the last stage; the others have none."""
        (tokens,) = self.tokens.wait()
        token_ids = tokens.astype(np.int32)
        failed = ()
        if (token_ids < 0).any():
            failed = tuple((int(self.plan.sample_rows[k]), NO_TOKEN) for k in np.flatnonzero(token_ids < 0))
        logprobs = None if self.scores is None else _logprob_arrays(token_ids, self.scores)
        prompts = tuple(_logprob_arrays(ids, copy) for ids, copy in self.prompt_scores)
        return StepResult(self.plan.step, token_ids, logprobs, prompts, failed)


def _logprob_arrays(token_ids: np.ndarray, copy: HostCopy) -> LogprobArrays:
    logprobs, ranks, top_ids, top_logprobs = copy.wait()
    return LogprobArrays(
        token_ids=token_ids,
        logprobs=logprobs,
        ranks=ranks.astype(np.int32),
        top_ids=top_ids.astype(np.int32),
        top_logprobs=top_logprobs,
    )


class Runner:
    """Executes plans in order on one device.

    Keeps what a plan only names: block table, last token and sampling parameters of every row. One row more than the
    plans know belongs to nobody: padding samples into it.
    """

    def __init__(
        self, model: DecoderModel, kv_cache: KVCache, config: ResolvedConfig, facts: ModelFacts, device: torch.device
    ) -> None:
        max_tokens, in_flight = config.scheduler.max_num_batched_tokens, config.scheduler.max_steps_in_flight
        block_size, max_rows = kv_cache.block_size, config.scheduler.max_num_seqs
        self.model, self.kv_cache, self.device = model, kv_cache, device
        state = make_row_state(max_rows + 1, -(-config.model.max_model_len // block_size), device)
        self._sampler = Sampler(state.sampling, facts.vocab_size, facts.eos_token_ids, device, model.comm)
        self._num_prompt_logprobs = np.zeros(max_rows, np.int32)
        self._copier = HostCopier(device)
        self._max_tokens = max_tokens
        self._inputs: StepInputs
        if backend_of(state.last_tokens) is Backend.TORCH:
            self._inputs = HostInputs(state, block_size)
        else:
            self._inputs = DeviceInputs(state, block_size, max_tokens, in_flight + 1)
        self._samples = model.comm.is_last_stage
        self._exchange = make_exchange(model.comm, state.last_tokens, max_tokens, facts.hidden_size, model.dtype)
        # Where each step's sampled states go, at an address that graphs can hold on to.
        self._sampled = torch.zeros(max_rows, facts.hidden_size, dtype=model.dtype, device=device)
        # Through a proxy: in a cycle with its graphs a runner that is done would keep its memory, of the device too,
        # until the garbage collector comes by.
        own = proxy(self)
        self._graphs = StepGraphs(partial(Runner._forward, own), partial(Runner._forward_dedup_layers, own), device)

    @torch.inference_mode()
    def compile_kernels(self, process: CompileProcess, max_tokens: int, num_neighbours: int = 1) -> int:
        """Compile, many at a time, the Triton kernels that steps launch; of up to `max_tokens` tokens in CUDA graphs.

        num_neighbours: runners that share this machine's cores. Returns how many were not there yet. To be called
        before anything else is run, on a runner that serves nobody afterwards: see `rehearsal`. Where that fails it
        says so and leaves them to their first launch.
        """
        from ...kernels.compiling.compile_triton import compile_kernels, rehearsal

        begin = time.perf_counter()
        with rehearsal() as kernels:
            self.warm_up(max_tokens)
        rehearsed = time.perf_counter()
        try:
            num_compiled = compile_kernels(kernels, process, max(1, usable_cores() // num_neighbours))
        except CompilationFailed as error:
            logger.warning("kernels compile at their first launch, one after the other: %s", error)
            return 0
        logger.info(
            "steps launch %d kernels, which were found in %.1f s; %d of them were compiled, in %.1f s",
            len(kernels), rehearsed - begin, num_compiled, time.perf_counter() - rehearsed,
        )  # fmt: skip
        return num_compiled

    @torch.inference_mode()
    def warm_up(self, max_tokens: int) -> None:
        """Go through steps of every kind: all that are captured, the largest, and what few requests ask for.

        Layers that are like others are left out, and what the steps compute is of no use.
        """
        decode, mixed = self._shapes(max_tokens)
        largest = self._shapes(self._max_tokens)[1][-1]
        for shape in (*decode, *mixed, largest):
            self._forward_dedup_layers(shape)
        if self._samples:
            self._sampler.warm_up(self.model.compute_logits(self._sampled))

    def capture(self, max_tokens: int) -> None:
        """Capture CUDA graphs of steps of up to `max_tokens` tokens; larger ones are launched kernel by kernel."""
        self._graphs.capture(*self._shapes(max_tokens))

    def _shapes(self, max_tokens: int) -> tuple[list[GraphShape], list[GraphShape]]:
        """Sizes of steps of up to `max_tokens` tokens that are captured: without and with prefills."""
        max_rows = len(self._sampled)
        decode, mixed = decode_shapes(max_rows), mixed_shapes(max_rows, max_tokens)
        split = self._samples and self._sampler.is_split
        return (with_filtered(decode), with_filtered(mixed)) if split else (decode, mixed)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Queue one step; on a CPU it has run when this returns."""
        if self._samples:
            self._start_samplers(plan)
        self._inputs.send(plan)
        if plan.copies:
            self.kv_cache.copy_blocks(plan.copies)
        if self._exchange is not None:
            self._exchange.recv_before_step(plan)
        scores_prompts = self._samples and len(plan.scored_slices) > 0
        shape = shape_of(plan)
        if self._sampler.has_filters(plan.sample_rows):
            shape = replace(shape, filtered=True)
        outputs = None if scores_prompts else self._graphs.replay(shape)
        if outputs is None:
            outputs = self._forward(shape)
        count, scores = 0, None
        if self._samples and len(plan.sample_rows):
            count, scores = len(plan.sample_rows), self._finish_samples(plan, outputs)
        if self._exchange is not None:
            self._exchange.send_after_step(plan)
        pending = PendingStep(plan, self._inputs.fetch_sampled_tokens(count), scores)
        if scores_prompts:
            assert outputs.hidden is not None, "such a step runs outside of graphs"
            pending.prompt_scores = self._score_prompts(plan, outputs.hidden)
        return pending

    def run(self, plan: StepPlan) -> StepResult:
        """Run one step and wait for its tokens; nothing of it is under way afterwards."""
        pending = self.launch(plan)
        self.synchronize()
        return pending.result()

    def synchronize(self) -> None:
        """Wait for the other stages, until none of them needs anything more of this one for the steps so far."""
        if self._exchange is not None:
            self._exchange.synchronize()

    @torch.inference_mode()
    def _forward(self, shape: GraphShape) -> StepOutputs:
        """One step of the plan that was sent last. No host value but `shape` decides anything: this is what a CUDA
        graph captures."""
        batch, exchange = self._inputs.batch(shape), self._exchange
        incoming = None if exchange is None else exchange.incoming(shape.tokens)
        hidden = self.model(batch.input_ids, batch.positions, batch.attention, self.kv_cache, incoming)
        if exchange is not None and not self._samples:
            exchange.stage_output(hidden)
            no_rows = batch.sample_rows[:0]
            return StepOutputs(None, None, self._sampled[:0], no_rows, no_rows)
        sampled = self._sampled[: shape.samples]
        torch.index_select(hidden, 0, batch.sample_indices, out=sampled)
        tokens, logits = batch.sample_rows, None
        if shape.samples:
            logits = self.model.compute_logits(sampled)
            tokens = self._sampler.sample(logits, batch.sample_rows, batch.sample_positions, filtered=shape.filtered)
            self._inputs.store_sampled_tokens(tokens, batch.sample_rows)
        return StepOutputs(hidden, logits, sampled, batch.sample_rows, tokens)

    def _forward_dedup_layers(self, shape: GraphShape) -> None:
        """Launches what `_forward` does, for fewer layers; what it computes is of no use."""
        with self.model.dedup_layers():
            self._forward(shape)

    def _start_samplers(self, plan: StepPlan) -> None:
        for start in plan.row_starts:
            self._sampler.start(start)
            self._num_prompt_logprobs[start.row] = start.sampling.prompt_logprobs or 0

    def _finish_samples(self, plan: StepPlan, outputs: StepOutputs) -> HostCopy | None:
        """What few samples want: their uncommon wishes, for which they choose again, and log-probabilities."""
        num_top, wishes = (
            self._sampler.num_logprobs(plan.sample_rows),
            self._sampler.has_logits_processors(plan.sample_rows),
        )
        if num_top is None and not wishes:
            return None
        logits = outputs.logits
        if logits is None:  # a graph's: the same product again, in the same shape, has the same bits
            logits = self.model.compute_logits(outputs.sampled)
        if wishes:
            positions = (plan.starts + plan.num_tokens)[plan.sample_slices]
            self._sampler.resample(logits, outputs.tokens, plan.sample_rows, positions)
            self._inputs.store_sampled_tokens(outputs.tokens, outputs.rows)
        if num_top is None:
            return None
        count = len(plan.sample_rows)
        return self._copier.start(
            list(self._sampler.score(logits[:count], outputs.tokens[:count].clamp(min=0), num_top))
        )

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> list[tuple[np.ndarray, HostCopy]]:
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

    def _score_positions(self, hidden: Tensor, targets: np.ndarray, num_top: int) -> list[Tensor]:
        target_ids = torch.from_numpy(targets.astype(np.int64)).to(self.device)
        parts = [
            self._sampler.score(self.model.compute_logits(some), ids, num_top)
            for some, ids in zip(hidden.split(_SCORED_CHUNK), target_ids.split(_SCORED_CHUNK), strict=True)
        ]
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
