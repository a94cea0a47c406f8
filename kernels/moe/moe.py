"""Mixture of experts: choose k experts for each token, run their gated MLPs, sum by weight.

    p = softmax(router logits);  experts e_1..e_k of token t are those of the largest p;  w_i = p[e_i] (/ sum_i p[e_i])
    y[t] = sum_i w_i * down[e_i] @ silu_mul(gate_up[e_i] @ x[t])

Legend: T tokens, E experts, k experts per token, H hidden features, I intermediate features. x [T, H]; router
logits [T, E]; gate_up [E, 2I, H] (gate rows first); down [E, H, I]; weights and expert ids [T, k].

On CUDA, CUDA graphs included: moe_route_triton.py, moe_triton.py, and moe_one_triton.py for one token.
Papers: Shazeer et al., 2017, arXiv:1701.06538; Jiang et al., Mixtral, 2024, arXiv:2401.04088.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backend import Backend, backend_of
from ..linear.silu_mul import ACTIVATIONS, silu_mul, silu_mul_ref
from .expected_experts import expected_experts


def route_ref(logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`, by a stable sort."""
    p, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, experts = p[:, :top_k], order[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def route(logits: torch.Tensor, top_k: int, *, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [T, k] in the logits' dtype, expert ids int64 [T, k]) of router logits [T, E], softmax in fp32.

    Largest first; of equals the kernel takes the lowest expert, torch any. NaN logits give k distinct
    experts.
    """
    if not 0 < top_k <= logits.shape[-1]:
        raise ValueError(f"top_k {top_k} is outside 1..{logits.shape[-1]}, the number of experts")
    if backend_of(logits) is not Backend.TORCH:
        from .moe_route_triton import route_triton

        return route_triton(logits, top_k, renormalize=renormalize)
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), experts


def moe_mlp_ref(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """Token by token in fp32; result [T, H] in x's dtype."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for token in range(x.shape[0]):
        for weight, expert in zip(weights[token].tolist(), experts[token].tolist(), strict=True):
            hidden = silu_mul_ref(gate_up[expert].float() @ x[token].float(), activation)
            out[token] += weight * (down[expert].float() @ hidden)
    return out.to(x.dtype)


def moe_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: str = "silu",
    *,
    invariant: bool = False,
) -> torch.Tensor:
    """The weighted sum of each token's experts, [T, H].

    With `invariant` a token's bits do not depend on the batch.
    """
    if gate_up.shape[1] != 2 * down.shape[2] or gate_up.shape[2] != x.shape[1] or experts.shape != weights.shape:
        raise ValueError(
            f"x {tuple(x.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)}, "
            f"weights {tuple(weights.shape)} and experts {tuple(experts.shape)} do not fit together"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; use one of {', '.join(ACTIVATIONS)}")
    if backend_of(x) is not Backend.TORCH:
        if x.shape[0] == 1 and not invariant:
            from .moe_one_triton import moe_one_token_triton

            return moe_one_token_triton(x, gate_up, down, weights, experts, activation)
        from .moe_triton import moe_mlp_triton

        return moe_mlp_triton(x, gate_up, down, weights, experts, activation, invariant=invariant)
    top_k = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=gate_up.shape[0]).tolist()
    tokens = torch.div(order, top_k, rounding_mode="floor")
    inputs, scales = x[tokens], weights.flatten()[order, None]
    out = torch.zeros_like(x)
    first = 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(first, first + count)
            hidden = silu_mul(F.linear(inputs[part], gate_up[expert]), activation)
            out.index_add_(0, tokens[part], F.linear(hidden, down[expert]).mul_(scales[part]))
            first += count
    return out


def moe_mlp_cost(
    num_tokens: int, num_experts: int, top_k: int, num_hidden: int, num_inner: int, dtype: torch.dtype
) -> tuple[int, int]:
    """(bytes, flops) of moe_mlp: the activated experts' weights, x and the result once."""
    weights = expected_experts(num_tokens, num_experts, top_k) * 3 * num_hidden * num_inner
    return (
        round((weights + 2 * num_tokens * num_hidden) * dtype.itemsize),
        6 * num_tokens * top_k * num_hidden * num_inner,
    )


def route_cost(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops) of route: logits, weights and ids; an exponential counts as one."""
    size = num_tokens * num_experts
    return size * dtype.itemsize + num_tokens * top_k * (dtype.itemsize + 8), (4 + top_k) * size
