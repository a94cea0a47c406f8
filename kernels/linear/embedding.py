"""Embedding lookup in this rank's rows of the table.

    out[t] = weight[id[t] - first_row] * scale      where first_row <= id[t] < first_row + N
    out[t] = 0                                      for any other id

Legend: T tokens, N rows of the table on this rank, H features. Under tensor parallelism each id has its row on one
rank, and the sum over ranks is the embedding. An id of no rank, such as padding leaves behind, gives zeros.

On a CUDA device: embedding_triton.py. Called for the input tokens of each step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..backend import Backend, backend_of


def embed_ref(input_ids: torch.Tensor, weight: torch.Tensor, first_row: int, scale: float) -> torch.Tensor:
    """The formula in torch; the product is taken in fp32 and rounded once."""
    local = input_ids - first_row
    foreign = (local < 0) | (local >= len(weight))
    out = F.embedding(local.masked_fill(foreign, 0), weight).masked_fill_(foreign[:, None], 0.0)
    return out if scale == 1.0 else out * scale


def embed(input_ids: torch.Tensor, weight: torch.Tensor, first_row: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Embeddings [T, H] of input_ids int64 [T] from weight [N, H], whose row 0 is that of id `first_row`."""
    if input_ids.dim() != 1 or weight.dim() != 2:
        raise ValueError(f"ids {list(input_ids.shape)} and weight {list(weight.shape)} must be [T] and [N, H]")
    if backend_of(weight) is Backend.TORCH:
        return embed_ref(input_ids, weight, first_row, scale)
    from .embedding_triton import embed_triton

    return embed_triton(input_ids, weight, first_row, scale)


def embed_cost(num_tokens: int, num_features: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): each row is read and written."""
    return 2 * num_tokens * num_features * dtype.itemsize, num_tokens * num_features
