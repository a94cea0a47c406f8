"""Number of experts that a batch of tokens activates."""

from __future__ import annotations


def expected_experts(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Experts that `num_tokens` tokens activate, when each picks its k of E uniformly."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)
