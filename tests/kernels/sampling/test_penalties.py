"""Penalties and the histories they follow, against loops over plain numbers."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.sampling.params import PenaltySlots
from shoal.kernels.sampling.penalties import (
    apply_penalties,
    apply_penalties_cost,
    begin_history,
    count_tokens,
    empty_slots,
)

VOCAB = 2501


def make_slots(device: torch.device) -> PenaltySlots:
    """Five slots: nothing, repetition, frequency, presence, all of them; tokens were seen in all but the first."""
    slots = empty_slots(5, VOCAB, device)
    for slot in range(1, 5):
        prompt = torch.tensor([1, 7, 7, VOCAB - 1], device=device) + (slot == 2)
        begin_history(slots.history[slot], prompt[:-1], torch.tensor([7, 3, 3, 2100], device=device))
    values = ((1, 1.3, 1, 1, 0.7), (0, 0, 0.4, 0, 0.3), (0, 0, 0, -0.6, 1.1))
    return PenaltySlots(slots.history, *(torch.tensor(v, dtype=torch.float32, device=device) for v in values))


def expected_row(row: torch.Tensor, slot: int, slots: PenaltySlots) -> torch.Tensor:
    """Token by token, each operation rounded to fp32."""
    _, repetition, frequency, presence = (each[slot].cpu() for each in slots)
    out = row.clone()
    for v, code in enumerate(slots.history[slot].tolist()):
        if code:
            x = row[v] / repetition if row[v] > 0 else row[v] * repetition
            x = x - frequency * float(code >> 1)
            out[v] = x - presence if code >> 1 else x
    return out


def test_histories_tell_prompt_from_emitted():
    history = torch.full((6,), 9, dtype=torch.int32)
    begin_history(history, torch.tensor([0, 2, 2]), torch.tensor([2, 4, 4, 4]))
    assert history.tolist() == [1, 0, 3, 0, 7, 0]


def test_penalties_equal_the_loop(device):
    slots = make_slots(device)
    logits = torch.randn(7, VOCAB + 3, generator=torch.Generator().manual_seed(4)).to(device)[:, :VOCAB]
    logits[:, 3] = float("-inf")  # forbidden before
    before = logits.cpu().clone()
    chosen = [4, -1, 1, 2, 0, 3, 4]
    apply_penalties(logits, torch.tensor(chosen, device=device), slots)
    for k, slot in enumerate(chosen):
        expected = before[k] if slot < 0 else expected_row(before[k], slot, slots)
        assert torch.equal(logits[k].cpu(), expected), k


def test_counting_goes_on_where_the_history_began(device):
    slots = make_slots(device)
    expected = slots.history.cpu().clone()
    picks = [(1, 3), (-1, 5), (4, 2500), (2, -1), (3, 7), (0, 0)]
    for slot, token in picks:
        if slot >= 0 and token >= 0:
            expected[slot, token] = (int(expected[slot, token]) | 1) + 2
    index, tokens = (torch.tensor(column, device=device) for column in zip(*picks, strict=True))
    count_tokens(slots.history, index, tokens)
    assert torch.equal(slots.history.cpu(), expected)
    count_tokens(slots.history, index[:0], tokens[:0])
    assert torch.equal(slots.history.cpu(), expected)


def test_wrong_arguments_are_named(device):
    slots = empty_slots(1, 8, device)
    index = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"float32 \[K, 8\]"):
        apply_penalties(torch.zeros(2, 9, device=device), index, slots)
    with pytest.raises(ValueError, match="float16"):
        apply_penalties(torch.zeros(2, 8, device=device, dtype=torch.float16), index, slots)
    with pytest.raises(ValueError, match=r"\[1\]"):
        count_tokens(slots.history, index, index[:1])


def test_cost():
    assert apply_penalties_cost(2, 10) == (240, 120)
