"""A step's operators beside its layers: embedding, sampling, scoring, block copies; and MoE.

B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from ...kernels.attention.block_copy import block_copy, block_copy_cost
from ...kernels.linear.embedding import embed, embed_cost
from ...kernels.moe.moe import moe_mlp, moe_mlp_cost, route
from ...kernels.sampling.params import PenaltySlots, SamplingRows
from ...kernels.sampling.penalties import apply_penalties, apply_penalties_cost
from ...kernels.sampling.sample import sample_rows, sample_rows_cost
from ...kernels.sampling.score import score, score_cost
from .kernel_cases import Built, Case, Sizes

_NUM_COPIES = 8
_NUM_TOP = 5
# temperature, top_k, top_p
_SAMPLERS = {"greedy": (0.0, 0, 1.0), "temperature": (0.6, 0, 1.0), "top-k 50, top-p 0.9": (0.6, 50, 0.9)}


def step_cases(sizes: Sizes, tokens: Sequence[int], batches: Sequence[int]) -> Iterator[Case]:
    """Embedding of all tokens, the sampler at every batch, copy-on-write of some blocks of one layer."""
    for num in tokens:
        yield Case("embed", f"T={num}", embed_cost(num, sizes.hidden, sizes.dtype), _embed(num, sizes))
    for batch in batches:
        cost = sample_rows_cost(batch, sizes.vocab_size, sizes.dtype)
        for name, settings in _SAMPLERS.items():
            # A greedy row draws no noise: one pass over its logits.
            own = (cost[0], batch * sizes.vocab_size) if name == "greedy" else cost
            yield Case(f"sample {name}", f"B={batch}", own, _sample(batch, sizes.vocab_size, *settings))
        cost = apply_penalties_cost(batch, sizes.vocab_size)
        yield Case("apply_penalties", f"B={batch}", cost, _penalties(batch, sizes.vocab_size))
        cost = score_cost(batch, sizes.vocab_size, sizes.dtype)
        yield Case(f"score, top {_NUM_TOP}", f"B={batch}", cost, _score(batch, sizes.vocab_size))
    block_numel = 2 * sizes.num_kv_heads * sizes.block_size * sizes.head_dim
    cost = block_copy_cost(_NUM_COPIES, block_numel, sizes.dtype)
    yield Case("block_copy", f"{_NUM_COPIES} blocks", cost, _block_copy(sizes))


def _sample(
    batch: int, vocab_size: int, temperature: float, top_k: int, top_p: float
) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        logits = torch.randn(batch, vocab_size, device=device, dtype=dtype)

        def same(value: float, kind: torch.dtype) -> torch.Tensor:
            return torch.full((batch,), value, dtype=kind, device=device)

        rows = torch.arange(batch, device=device)
        params = SamplingRows(
            temperature=same(temperature, torch.float32),
            top_k=same(top_k, torch.int32),
            top_p=same(top_p, torch.float32),
            min_p=same(0.0, torch.float32),
            seed=torch.arange(batch, device=device),
        )
        peers = {"torch": lambda: logits.argmax(-1)} if temperature == 0.0 else {}
        return Built(lambda: sample_rows(logits, rows, params, rows), peers)

    return build


def _embed(num: int, sizes: Sizes) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        weight = torch.randn(sizes.vocab_size, sizes.hidden, device=device, dtype=dtype)
        ids = torch.randint(sizes.vocab_size, (num,), device=device)
        return Built(lambda: embed(ids, weight), {"torch": lambda: F.embedding(ids, weight)})

    return build


def _penalties(batch: int, vocab_size: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        del dtype  # penalised logits are fp32
        logits = torch.randn(batch, vocab_size, device=device)
        history = torch.randint(5, (batch, vocab_size), dtype=torch.int32, device=device)
        repetition, frequency, presence = (torch.full((batch,), value, device=device) for value in (1.0, 1e-3, 1e-3))
        slots = torch.arange(batch, device=device)
        penalties = PenaltySlots(history, repetition, frequency, presence)
        return Built(lambda: apply_penalties(logits, slots, penalties))

    return build


def _score(batch: int, vocab_size: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        logits = torch.randn(batch, vocab_size, device=device, dtype=dtype)
        token_ids = torch.randint(vocab_size, (batch,), device=device)
        return Built(lambda: score(logits, token_ids, _NUM_TOP))

    return build


def _block_copy(sizes: Sizes) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        num_blocks = 8 * _NUM_COPIES
        shape = (num_blocks, 2, sizes.num_kv_heads, sizes.block_size, sizes.head_dim)
        cache = torch.randn(shape, device=device, dtype=dtype)
        source, target = torch.randperm(num_blocks, device=device)[: 2 * _NUM_COPIES].chunk(2)
        return Built(lambda: block_copy(cache, source, target))

    return build


def moe_cases(tokens: Sequence[int], num_experts: int, top_k: int, hidden: int, inner: int) -> Iterator[Case]:
    """The experts of one layer, chosen evenly by random logits."""
    for num in tokens:
        cost = moe_mlp_cost(num, num_experts, top_k, hidden, inner, torch.bfloat16)
        shape = f"T={num} E={num_experts} k={top_k} {hidden}x{inner}"
        yield Case("moe_mlp", shape, cost, _moe(num, num_experts, top_k, hidden, inner))


def _moe(num: int, num_experts: int, top_k: int, hidden: int, inner: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        x = torch.randn(num, hidden, device=device, dtype=dtype)
        gate_up = torch.randn(num_experts, 2 * inner, hidden, device=device, dtype=dtype).mul_(hidden**-0.5)
        down = torch.randn(num_experts, hidden, inner, device=device, dtype=dtype).mul_(inner**-0.5)
        logits = torch.randn(num, num_experts, device=device, dtype=dtype)
        weights, experts = route(logits, top_k, renormalize=True)
        return Built(lambda: moe_mlp(x, gate_up, down, weights, experts))

    return build
