"""A dense decoder's operators at the sizes it uses, and peers for the same work.

T tokens, B sequences. Each `build` makes its own random data, never zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ...kernels.attention import kv_store, rope
from ...kernels.linear import gemm, rms_norm, silu_mul
from ...replicas.config import ModelFacts
from .timing import Thunk

Cost = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Built:
    """One copy of a case's data, ready to call."""

    ours: Thunk
    peers: Mapping[str, Thunk] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """An operator at one shape. `cost` is (bytes, flops)."""

    operator: str
    shape: str
    cost: Cost
    build: Callable[[str, torch.dtype], Built]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one model."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, facts: ModelFacts, intermediate: int, device: str, dtype: torch.dtype) -> Sizes:
        return cls(
            facts.hidden_size,
            intermediate,
            facts.num_attention_heads,
            facts.num_kv_heads,
            facts.head_dim,
            facts.vocab_size,
            64 if device == "cuda" else 16,
            dtype,
        )


def row_cases(sizes: Sizes, tokens: Sequence[int]) -> Iterator[Case]:
    """Norms, gated activation, RoPE with the KV write: rows of T tokens."""
    hidden, inter, dtype = sizes.hidden, sizes.intermediate, sizes.dtype
    for num in tokens:
        shape = f"T={num}"
        yield Case("rms_norm", shape, rms_norm.rms_norm_cost(num, hidden, dtype), _rms_norm(num, hidden))
        yield Case("add_rms_norm", shape, rms_norm.add_rms_norm_cost(num, hidden, dtype), _add_rms_norm(num, hidden))
        yield Case("silu_mul", shape, silu_mul.silu_mul_cost(num, inter, dtype), _silu_mul(num, inter))
        cost = kv_store.rope_kv_store_cost(
            num, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.head_dim, dtype
        )
        yield Case("rope_kv_store", shape, cost, _rope_kv_store(num, sizes))


def _rms_norm(num: int, hidden: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        x, weight = _random(device, dtype, num, hidden), _random(device, dtype, hidden)
        ours = lambda: rms_norm.rms_norm(x, weight, 1e-5)  # noqa: E731
        return Built(ours, {"torch": lambda: F.rms_norm(x, (hidden,), weight, 1e-5)})

    return build


def _add_rms_norm(num: int, hidden: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        x, residual = _random(device, dtype, num, hidden) * 1e-3, _random(device, dtype, num, hidden)
        weight = _random(device, dtype, hidden)
        return Built(lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5))

    return build


def _silu_mul(num: int, inter: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        x = _random(device, dtype, num, 2 * inter)
        return Built(lambda: silu_mul.silu_mul(x))

    return build


def _rope_kv_store(num: int, sizes: Sizes) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        num_rows = sizes.num_heads + 2 * sizes.num_kv_heads
        qkv = _random(device, dtype, num, num_rows, sizes.head_dim)
        num_blocks = -(-num // sizes.block_size) + 1
        cache = _random(device, dtype, num_blocks, 2, sizes.num_kv_heads, sizes.block_size, sizes.head_dim)
        positions = torch.randperm(4 * num, device=device)[:num]
        angles = _random(device, torch.float32, 4 * num, sizes.head_dim)
        factors = rope.rope_rows(angles, positions, dtype)
        slots = torch.randperm(num_blocks * sizes.block_size, device=device)[:num]
        rows = kv_store.store_rows(slots, sizes.num_kv_heads, sizes.block_size)
        return Built(lambda: kv_store.rope_kv_store(qkv, sizes.num_heads, factors, cache, rows))

    return build


def gemm_cases(sizes: Sizes, tokens: Sequence[int]) -> Iterator[Case]:
    """The GEMMs of one layer and the output head, beside torch's (cuBLAS on a GPU)."""
    heads = sizes.num_heads * sizes.head_dim
    products = {
        "qkv": (heads + 2 * sizes.num_kv_heads * sizes.head_dim, sizes.hidden),
        "o": (sizes.hidden, heads),
        "down": (sizes.hidden, sizes.intermediate),
        "lm_head": (sizes.vocab_size, sizes.hidden),
    }
    for num in tokens:
        for name, (outputs, inputs) in products.items():
            cost = gemm.linear_cost(num, outputs, inputs, sizes.dtype)
            yield Case(f"linear {name}", f"T={num}", cost, _linear(num, outputs, inputs))
        cost = gemm.gated_linear_cost(num, sizes.intermediate, sizes.hidden, sizes.dtype)
        yield Case("gated_linear", f"T={num}", cost, _gated_linear(num, sizes.intermediate, sizes.hidden))


def _linear(num: int, outputs: int, inputs: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        x, weight = _random(device, dtype, num, inputs), _weight(device, dtype, outputs, inputs)
        return Built(lambda: gemm.linear(x, weight), {"cuBLAS": lambda: F.linear(x, weight)})

    return build


def _gated_linear(num: int, outputs: int, inputs: int) -> Callable[[str, torch.dtype], Built]:
    def build(device: str, dtype: torch.dtype) -> Built:
        x, weight = _random(device, dtype, num, inputs), _weight(device, dtype, 2 * outputs, inputs)
        # The GEMM alone: silu_mul has its own row.
        return Built(lambda: gemm.gated_linear(x, weight), {"cuBLAS": lambda: F.linear(x, weight)})

    return build


def _random(device: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=dtype)


def _weight(device: str, dtype: torch.dtype, outputs: int, inputs: int) -> torch.Tensor:
    return _random(device, dtype, outputs, inputs).mul_(1 / math.sqrt(inputs))
