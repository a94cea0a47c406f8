"""Sampling of unfiltered rows where each rank has the logits of one slice of the vocabulary.

    key[k]   = score and token of a slice's argmax, by sample.py's score
    token[k] = that of the highest key over all ranks

A key is an int64 ordered by score, then by lowest token. Ranks exchange eight bytes a row. The token is
bit-equal to the whole vocabulary's.

Legend: K rows, V tokens of a slice, R ranks. On CUDA: sample_slice_triton.py.
"""

from __future__ import annotations

import torch

from ..backend import Backend, backend_of
from .sample import SamplingRows, check_logits, gumbel_noise

LAST_TOKEN = 2**31 - 1
UNUSABLE = LAST_TOKEN << 32  # above any score's key: NaN, +inf or padding
NOTHING = -(2**31 - 2**23 + 1)  # high half of the key of score -inf
SHARED_NOISE = 4  # tokens that share a counter of the noise


def best_keys(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor, first_token: int
) -> torch.Tensor:
    """The key of each row's best token of a slice, int64 [K]; arguments as those of `sample.sample_rows`.

    logits [K, V] begin at `first_token`, a multiple of SHARED_NOISE; V may be 0. Filters of `params` are
    ignored. Raises ValueError for other shapes or dtypes.
    """
    check_logits(logits, rows, positions)
    if first_token % SHARED_NOISE:
        raise ValueError(f"a slice must begin at a multiple of {SHARED_NOISE} tokens, not at {first_token}")
    if backend_of(logits) is Backend.TORCH:
        return best_keys_ref(logits, rows, params, positions, first_token)
    from .sample_slice_triton import best_keys_triton

    return best_keys_triton(logits, rows, params, positions, first_token)


def best_keys_ref(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor, first_token: int
) -> torch.Tensor:
    """`best_keys` in plain torch."""
    wide = logits.float() if logits.shape[1] else logits.new_full((len(logits), 1), float("-inf"), dtype=torch.float32)
    usable = (wide < float("inf")).all(dim=1) & (rows >= 0)
    known = rows.clamp(min=0)
    temperature = params.temperature[known]
    greedy = (temperature == 0.0).unsqueeze(1)
    scores = wide
    if temperature.any():
        scaled = wide * torch.where(greedy, 1.0, temperature.unsqueeze(1)).reciprocal()
        noise = gumbel_noise(params.seed[known], positions, wide.shape[1], first_token)
        scores = torch.where(greedy, wide, scaled + noise)
    tokens = scores.argmax(dim=1, keepdim=True)
    keys = make_keys(scores.gather(1, tokens), first_token + tokens).squeeze(1)
    return torch.where(usable, keys, UNUSABLE)


def make_keys(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Keys int64 of scores float32 and tokens int64 of one shape."""
    bits = (scores + 0.0).view(torch.int32).long()  # -0 becomes +0
    return (torch.where(bits < 0, bits ^ LAST_TOKEN, bits) << 32) + (LAST_TOKEN - tokens)


def read_keys(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores and tokens of keys."""
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ LAST_TOKEN, ordered).int()
    return bits.view(torch.float32), LAST_TOKEN - (keys & LAST_TOKEN)


def winners(keys: torch.Tensor) -> torch.Tensor:
    """The tokens int64 [K] of keys int64 [R, K], one row per slice; -1 as in `sample.sample_rows`.

    Raises ValueError for keys of another form.
    """
    if keys.dim() != 2 or keys.dtype != torch.int64 or not keys.is_contiguous():
        raise ValueError(f"keys must be contiguous int64 [R, K], got {keys.dtype} {list(keys.shape)}")
    if backend_of(keys) is Backend.TORCH:
        return winners_ref(keys)
    from .sample_slice_triton import winners_triton

    return winners_triton(keys)


def winners_ref(keys: torch.Tensor) -> torch.Tensor:
    """`winners` in plain torch."""
    key = keys.amax(dim=0)
    score = key >> 32
    return torch.where((score == LAST_TOKEN) | (score == NOTHING), -1, LAST_TOKEN - (key & LAST_TOKEN))


def best_keys_cost(num_rows: int, slice_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops)."""
    size = num_rows * slice_size
    return size * dtype.itemsize + 8 * num_rows, 90 * size
