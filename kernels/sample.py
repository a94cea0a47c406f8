"""Choosing tokens: temperature, min-p, top-k and top-p, then Gumbel-max with counter-based noise.

    z[k, v]  = logits[k, v] / temperature[k], with tokens outside min-p, top-k and top-p at -inf
    u[k, v]  = Philox4x32-10(key = seed[k], counter = (v // 4, position[k], 0, 0))[v % 4], in (0, 1)
    token[k] = argmax_v z[k, v] - log(-log(u[k, v]))          (argmax_v logits[k, v] where temperature is 0)

Adding Gumbel noise and taking the argmax draws from softmax(z) exactly (Maddison et al., "A* Sampling", 2014). The
noise is a function of (seed, position, token) alone (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
2011), so a token does not depend on what else is in the batch, and a stream can be replayed from any position.

Letters: K rows to sample, V vocabulary. Called by the sampler of each shard. Runs on any device that torch knows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(seeds: torch.Tensor, positions: torch.Tensor, num_counters: int) -> torch.Tensor:
    """Philox4x32-10 words, int64 [K, num_counters, 4] with values below 2**32.

    seeds: int64 [K], the bit pattern of the 64-bit key; positions: int64 [K].
    """
    c0 = torch.arange(num_counters, dtype=torch.int64, device=seeds.device).expand(len(seeds), num_counters)
    c1 = (positions & _MASK32).unsqueeze(1).expand_as(c0)
    c2 = (positions >> 32 & _MASK32).unsqueeze(1).expand_as(c0)
    c3 = torch.zeros_like(c0)
    k0, k1 = (seeds & _MASK32).unsqueeze(1), (seeds >> 32 & _MASK32).unsqueeze(1)
    for _ in range(_ROUNDS):
        # A 32 x 32 bit product wraps in int64 but keeps its bit pattern; the mask undoes the sign of the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & _MASK32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> 32 & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = k0 + _WEYL[0] & _MASK32, k1 + _WEYL[1] & _MASK32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [K, vocab_size], of (seed, position, token) alone."""
    words = philox(seeds, positions, -(-vocab_size // 4)).flatten(1)[:, :vocab_size]
    # 23 bits and a half: the largest uniform is 1 - 2**-24, the last float32 below one, so both logs are finite.
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def filter_logits(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """`logits` [K, V] with every token outside min-p, top-k and top-p at -inf, applied in this order.

    top_k: int64 [K], 0 keeps all; top_p: float32 [K], 1 keeps all; min_p: float32 [K], relative to the likeliest.
    Tokens that tie with the k-th are kept. The likeliest token always stays.
    """
    vocab_size = logits.shape[1]
    floor = logits.amax(dim=1, keepdim=True) + torch.log(min_p).unsqueeze(1)
    logits = logits.masked_fill(logits < floor, float("-inf"))
    ordered, order = logits.sort(dim=1, descending=True)
    last = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size) - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last.unsqueeze(1)), float("-inf"))
    probs = ordered.softmax(dim=1)
    # A token stays while the mass before it is below top_p, so the one that crosses the line stays too. top_p = 1
    # must keep all even where rounding carries the sum past one.
    outside = (probs.cumsum(dim=1) - probs >= top_p.unsqueeze(1)) & (top_p < 1.0).unsqueeze(1)
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    filtered: bool = True,
) -> torch.Tensor:
    """One token for each row, int64 [K].

    logits: float32 [K, V]. temperature, top_p, min_p: float32 [K]; top_k, seeds, positions: int64 [K]; position is
    that of the token to be chosen. `filtered=False` says that no row uses min-p, top-k or top-p, and saves the sort.
    """
    if logits.dim() != 2 or logits.dtype != torch.float32:
        raise ValueError(f"logits must be float32 [K, V], got {logits.dtype} {list(logits.shape)}")
    greedy = temperature == 0.0
    scaled = logits / torch.where(greedy, 1.0, temperature).unsqueeze(1)
    if filtered:
        scaled = filter_logits(scaled, top_k, top_p, min_p)
    noise = gumbel_noise(seeds, positions, logits.shape[1])
    return torch.where(greedy, logits.argmax(dim=1), (scaled + noise).argmax(dim=1))


class SamplingRows(NamedTuple):
    """Sampling parameters by row, each [R], on the device of the logits."""

    temperature: torch.Tensor  # float32, 0: greedy
    top_k: torch.Tensor  # int32, 0: all
    top_p: torch.Tensor  # float32, 1: all
    min_p: torch.Tensor  # float32, 0: all
    seed: torch.Tensor  # int64, bit pattern of the 64-bit key


def sample_rows(
    logits: torch.Tensor, rows: torch.Tensor, params: SamplingRows, positions: torch.Tensor
) -> torch.Tensor:
    """One token for each of rows int64 [K], from logits [K, V]; int64 [K], -1 where the logits are of no use."""
    wide = logits.float()
    usable = wide.amax(dim=1).isfinite()
    temperature = params.temperature[rows]
    if not temperature.any():
        tokens = wide.argmax(dim=1)
    else:
        top_k, top_p, min_p = params.top_k[rows].long(), params.top_p[rows], params.min_p[rows]
        filtered = bool(((top_p < 1.0) | (min_p > 0.0) | ((top_k > 0) & (top_k < logits.shape[1]))).any())
        tokens = sample(wide, temperature, top_k, top_p, min_p, params.seed[rows], positions, filtered=filtered)
    return torch.where(usable, tokens, -1)


def score(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of `token_ids` int64 [P] under `logits` float32 [P, V].

    Returns logprobs float32 [P], ranks int64 [P] (1 is the likeliest; ties rank equal), and the `num_top` likeliest
    tokens of each row: ids int64 [P, num_top] and logprobs float32 [P, num_top].
    """
    logprobs = logits.log_softmax(dim=1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=1) + 1
    top_logprobs, top_ids = logprobs.topk(num_top, dim=1)
    return chosen.squeeze(1), ranks, top_ids, top_logprobs
