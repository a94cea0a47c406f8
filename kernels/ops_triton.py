"""Device functions shared by several kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(gate, up, GELU: tl.constexpr):
    """act(gate) * up: SiLU, or GELU in its tanh form.

    0.5 * (1 + tanh(u)) = sigmoid(2u), which every Triton backend has.
    """
    if GELU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    else:
        inner = gate
    return gate * tl.sigmoid(inner) * up


@triton.jit
def argmax_lowest(scores, tokens):
    """(highest score, its token): the lowest token among ties. Both [N]."""
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, tokens, 2147483647), axis=0)


@triton.jit
def softmax_step(scores, highest, unit):
    """(p, shrink, new maximum) of one online softmax step over a block of scores [rows, keys].

    `unit` converts scores to base 2; `shrink` rescales the sums of earlier blocks to the new maximum.
    """
    higher = tl.maximum(highest, tl.max(scores, 1) * unit)
    return tl.exp2(scores * unit - higher[:, None]), tl.exp2(highest - higher), higher
