"""Number of experts that a batch of tokens activates."""

from __future__ import annotations


def expected_experts(num_tokens: int, num_experts: int, top_k: int) -> float:
    """How many experts `num_tokens` tokens touch, when each chooses its k of E with equal chances."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
