"""Triton kernels of penalties.py.

Each operation is rounded (no fused multiply-add), so logits equal the CPU's bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .params import PenaltySlots

BLOCK_V, BLOCK_K, NUM_WARPS = 2048, 128, 8


@triton.jit
def _apply_penalties_kernel(
    logits_ptr,
    slots_ptr,
    history_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    stride_logits,
    stride_history,
    vocab_size,
    BLOCK_V: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (b, k) applies the penalties to tokens b * BLOCK_V .. of row k."""
    k = tl.program_id(1).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    slot = tl.load(slots_ptr + k)
    if slot < 0:
        return
    tokens = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = tokens < vocab_size
    x = tl.load(logits_ptr + k * stride_logits + tokens, mask=mask)
    history = tl.load(history_ptr + slot * stride_history + tokens, mask=mask)
    counts = history >> 1
    repetition = tl.load(repetition_ptr + slot)
    x = tl.where(history > 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
    x -= tl.load(frequency_ptr + slot) * counts.to(tl.float32)
    x -= tl.load(presence_ptr + slot) * (counts > 0).to(tl.float32)
    tl.store(logits_ptr + k * stride_logits + tokens, x, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _count_tokens_kernel(
    history_ptr, slots_ptr, token_ptr, stride_history, num_rows, BLOCK_K: tl.constexpr, PDL: tl.constexpr
):
    """Program p counts the emitted tokens of rows p * BLOCK_K .. in their slots."""
    rows = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    slots = tl.load(slots_ptr + rows, mask=rows < num_rows, other=-1)
    tokens = tl.load(token_ptr + rows, mask=rows < num_rows, other=-1)
    held = (slots >= 0) & (tokens >= 0)
    places = history_ptr + slots * stride_history + tokens
    tl.store(places, (tl.load(places, mask=held) | 1) + 2, mask=held)


def apply_penalties_triton(logits: torch.Tensor, slots: torch.Tensor, penalties: PenaltySlots) -> None:
    """`penalties.apply_penalties` for checked arguments."""
    num_rows, vocab_size = logits.shape
    if num_rows:
        launch_kernel(
            _apply_penalties_kernel,
            (triton.cdiv(vocab_size, BLOCK_V), num_rows),
            (logits, slots, *penalties, logits.stride(0), penalties.history.stride(0), vocab_size),
            BLOCK_V=BLOCK_V,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
            **pdl_launch(logits),
        )


def count_tokens_triton(history: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """`penalties.count_tokens` for checked arguments."""
    if len(slots):
        launch_kernel(
            _count_tokens_kernel,
            (triton.cdiv(len(slots), BLOCK_K),),
            (history, slots, token_ids, history.stride(0), len(slots)),
            BLOCK_K=BLOCK_K,
            num_warps=4,
            **pdl_launch(history),
        )
