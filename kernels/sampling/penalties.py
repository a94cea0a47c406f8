"""Repetition, frequency and presence penalties of many sequences at once.

    x'[k, v] = x[k, v] / r  where x > 0,  x[k, v] * r  elsewhere        for tokens v of the prompt or emitted
    x[k, v] <- x' - f * n[k, v] - p * (n[k, v] > 0)                     n: how often v was emitted

Legend: K rows of logits, V vocabulary, S slots. A sequence with penalties has a slot of `history` int32 [S,
V]. Each token's entry is 0: never seen, 1: in the prompt alone, 2 n + 1: emitted n times. A slot takes 0.5
MB at V = 128,256. r, f, p [S] are the slots' penalties.

On CUDA: penalties_triton.py. Paper: Keskar et al., CTRL, 2019, arXiv:1909.05858 (repetition).
"""

from __future__ import annotations

import torch

from ..backend import Backend, backend_of
from .params import PenaltySlots


def empty_slots(num_slots: int, vocab_size: int, device: torch.device) -> PenaltySlots:
    """Empty slots with neutral penalties."""
    zeros = torch.zeros(num_slots, device=device)
    history = torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device)
    return PenaltySlots(history, torch.ones_like(zeros), zeros, zeros.clone())


def begin_history(history: torch.Tensor, prompt_ids: torch.Tensor, emitted_ids: torch.Tensor) -> None:
    """Fill one slot's `history` int32 [V] from the ids int64 of a sequence."""
    history.zero_()
    history.index_add_(0, emitted_ids, torch.full_like(emitted_ids, 2, dtype=torch.int32))
    for ids in (prompt_ids, emitted_ids):
        history.index_copy_(0, ids, history[ids] | 1)


def apply_penalties_ref(logits: torch.Tensor, slots: torch.Tensor, penalties: PenaltySlots) -> None:
    """The formula in torch, in place."""
    held = slots >= 0
    history, *values = (each[slots.clamp(min=0)] for each in penalties)
    repetition, frequency, presence = (value.unsqueeze(1) for value in values)
    counts = history >> 1
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalised = torch.where(history > 0, penalised, logits)
    penalised -= frequency * counts.float()
    penalised -= presence * (counts > 0).float()
    torch.where(held.unsqueeze(1), penalised, logits, out=logits)


def apply_penalties(logits: torch.Tensor, slots: torch.Tensor, penalties: PenaltySlots) -> None:
    """Penalise `logits` float32 [K, V] in place by each row's slot, int64 [K]; slot -1 changes nothing."""
    history = penalties.history
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[1] != history.shape[1]:
        raise ValueError(
            f"logits must be float32 [K, {history.shape[1]}], as wide as the histories; "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    if backend_of(logits) is Backend.TORCH:
        apply_penalties_ref(logits, slots, penalties)
        return
    from .penalties_triton import apply_penalties_triton

    apply_penalties_triton(logits, slots, penalties)


def count_tokens_ref(history: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """`count_tokens` in torch."""
    held = (slots >= 0) & (token_ids >= 0)
    slots, token_ids = slots[held], token_ids[held]
    history[slots, token_ids] = (history[slots, token_ids] | 1) + 2


def count_tokens(history: torch.Tensor, slots: torch.Tensor, token_ids: torch.Tensor) -> None:
    """Count in `history` int32 [S, V] the emitted token_ids int64 [K] of `slots` int64 [K].

    Slots are distinct; negative slots or tokens are skipped.
    """
    if slots.shape != token_ids.shape or slots.dim() != 1:
        raise ValueError(f"slots {list(slots.shape)} and token_ids {list(token_ids.shape)} must both be [K]")
    if backend_of(history) is Backend.TORCH:
        count_tokens_ref(history, slots, token_ids)
        return
    from .penalties_triton import count_tokens_triton

    count_tokens_triton(history, slots, token_ids)


def apply_penalties_cost(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """(bytes, flops)."""
    size = num_rows * vocab_size
    return 12 * size, 6 * size
