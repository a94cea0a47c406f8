"""Embedding lookup in this rank's rows of the table.

    out[t] = weight[id[t] - first_row] * scale      where first_row <= id[t] < first_row + N
    out[t] = 0                                      for any other id

Legend: T tokens, N rows on this rank, H features. Under tensor parallelism the all-reduce gives the
embedding, as each id has one rank. An id of no rank (padding) gives zeros.

On CUDA: embedding_triton.py. Called for each step's input tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backend import Backend, backend_of


def embed_ref(input_ids: torch.Tensor, weight: torch.Tensor, first_row: int, scale: float) -> torch.Tensor:
    """The formula in torch: fp32 multiplication, rounded once."""
    local = input_ids - first_row
    foreign = (local < 0) | (local >= len(weight))
    out = F.embedding(local.masked_fill(foreign, 0), weight).masked_fill_(foreign[:, None], 0.0)
    return out if scale == 1.0 else out * scale


def embed(input_ids: torch.Tensor, weight: torch.Tensor, first_row: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Embeddings [T, H] of input_ids int64 [T] from weight [N, H]; row 0 is id `first_row`."""
    if input_ids.dim() != 1 or weight.dim() != 2:
        raise ValueError(f"ids {list(input_ids.shape)} and weight {list(weight.shape)} must be [T] and [N, H]")
    if backend_of(weight) is Backend.TORCH:
        return embed_ref(input_ids, weight, first_row, scale)
    from .embedding_triton import embed_triton

    return embed_triton(input_ids, weight, first_row, scale)


def embed_cost(num_tokens: int, num_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): each row read and written."""
    return 2 * num_tokens * num_features * dtype.itemsize, num_tokens * num_features
