"""Sampling: temperature, min-p, top-k and top-p, then Gumbel-max with counter-based noise.

    z[k, v]  = logits[k, v] / temperature[k], with tokens outside min-p, top-k and top-p at -inf
    u[k, v]  = Philox4x32-10(key = seed[k], counter = (v // 4, position[k], 0, 0))[v % 4], in (0, 1)
    token[k] = argmax_v z[k, v] - log(-log(u[k, v]))          (argmax_v logits[k, v] where temperature is 0)

The argmax with Gumbel noise samples softmax(z) exactly (Maddison et al., "A* Sampling", 2014). Noise
depends on (seed, position, token) alone (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
2011).

Legend: K rows to sample, V vocabulary, R rows of parameters. On CUDA: sample_triton.py and
sample_limits_triton.py.
"""

from __future__ import annotations

import torch

from ..backend import Backend, backend_of
from .params import SamplingRows

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def philox(seeds: torch.Tensor, positions: torch.Tensor, num_counters: int, first_counter: int = 0) -> torch.Tensor:
    """Philox4x32-10 words, int64 [K, num_counters, 4] below 2**32, of counters from `first_counter` on.

    seeds: int64 [K], the bit pattern of the 64-bit key; positions: int64 [K].
    """
    counters = torch.arange(first_counter, first_counter + num_counters, dtype=torch.int64, device=seeds.device)
    c0 = counters.expand(len(seeds), num_counters)
    c1 = (positions & _MASK32).unsqueeze(1).expand_as(c0)
    c2 = (positions >> 32 & _MASK32).unsqueeze(1).expand_as(c0)
    c3 = torch.zeros_like(c0)
    k0, k1 = (seeds & _MASK32).unsqueeze(1), (seeds >> 32 & _MASK32).unsqueeze(1)
    for _ in range(_ROUNDS):
        # A 32 x 32 bit product wraps in int64 but keeps its bits; the mask clears the shift's sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = k0 + _WEYL[0] & _MASK32, k1 + _WEYL[1] & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, num_tokens: int, first_token: int = 0) -> torch.Tensor:
    """Standard Gumbel noise, float32 [K, num_tokens], of tokens from `first_token` on.

    `first_token` is a multiple of 4.
    """
    words = philox(seeds, positions, -(-num_tokens // 4), first_token // 4).flatten(1)[:, :num_tokens]
    # 23.5 bits: the largest uniform is 1 - 2**-24, the last float32 below one; both logs are finite.
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def filter_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """`logits` [K, V] with every token outside min-p, top-k and top-p (in this order) at -inf.

    top_k: integer [K], 0 keeps all; top_p: float32 [K], 1 keeps all; min_p: float32 [K], relative to the
    most probable token. Ties with the last kept token stay, and the most probable token.
    """
    vocab_size = logits.shape[1]
    floor = logits.amax(dim=1, keepdim=True) + torch.log(min_p).unsqueeze(1)
    logits = logits.masked_fill(logits < floor, float("-inf"))
    ordered = logits.sort(dim=1, descending=True).values
    last = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size).long() - 1
    kth = ordered.gather(1, last.unsqueeze(1))
    probs = ordered.masked_fill(ordered < kth, float("-inf")).softmax(dim=1)
    # The token that crosses top_p stays. top_p = 1 must keep all even if rounding carries the sum past one.
    outside = (probs.cumsum(dim=1) - probs >= top_p.unsqueeze(1)) & (top_p < 1.0).unsqueeze(1)
    outside[:, 0] = False
    lowest = ordered.masked_fill(outside, float("inf")).amin(dim=1, keepdim=True)
    return logits.masked_fill(logits < torch.maximum(kth, lowest), float("-inf"))


def sample_rows(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor
) -> torch.Tensor:
    """One token for each row of `logits`, int64 [K]; -1 where a row holds NaN or +inf, or -inf alone.

    logits: float32, bfloat16 or float16 [K, V]; rows may be strided. rows: int64 [K], each row's index in
    `params`; negative is padding and gives -1. positions: int64 [K] of the sampled tokens.
    """
    check_logits(logits, rows, positions)
    if backend_of(logits) is Backend.TORCH:
        return sample_rows_ref(logits, rows, params, positions)
    from .sample_triton import sample_rows_triton

    return sample_rows_triton(logits, rows, params, positions)


def check_logits(logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> None:
    """Raises ValueError for mismatched arguments."""
    if logits.dim() != 2 or logits.dtype not in _FLOATS or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [K, V] in float32, bfloat16 or float16 without gaps in a row, got {logits.dtype} "
            f"{list(logits.shape)} with strides {logits.stride()}"
        )
    if rows.shape != logits.shape[:1] or positions.shape != rows.shape:
        raise ValueError(
            f"{len(logits)} rows of logits need as many rows and positions, got {rows.shape} and {positions.shape}"
        )


def sample_rows_ref(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor
) -> torch.Tensor:
    """By a sort; reads the parameters, to skip unused filters."""
    wide = logits.float()
    usable = wide.amax(dim=1).isfinite() & (rows >= 0)
    tokens = wide.argmax(dim=1)
    known = rows.clamp(min=0)
    temperature = params.temperature[known]
    if temperature.any():
        top_k, top_p, min_p = params.top_k[known], params.top_p[known], params.min_p[known]
        greedy = temperature == 0.0
        scaled = wide * torch.where(greedy, 1.0, temperature).reciprocal().unsqueeze(1)
        narrowed = ((top_k > 0) & (top_k < wide.shape[1])) | (top_p < 1.0) | (min_p > 0.0)
        if narrowed.any():
            scaled = filter_logits(scaled, top_k, top_p, min_p)
        noise = gumbel_noise(params.seed[known], positions, wide.shape[1])
        tokens = torch.where(greedy, tokens, (scaled + noise).argmax(dim=1))
    return torch.where(usable, tokens, -1)


def sample_rows_cost(num_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes, flops): logits are read once; noise takes 90 operations a token, 40 of them Philox."""
    size = num_rows * vocab_size
    return size * dtype.itemsize, 90 * size
