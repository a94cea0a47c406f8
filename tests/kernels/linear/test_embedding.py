"""Embedding rows, those of other ranks as zeros."""

import pytest
import torch
import torch.nn.functional as F

from shoal.kernels.linear.embedding import embed, embed_cost


@pytest.mark.parametrize("num_features", [1, 8, 100, 1024, 1500])
def test_ranks_add_up_to_the_whole_table(num_features, device, dtype):
    """Two ranks of 11 rows; ids beyond both, as padding leaves them, read nothing and give zeros."""
    table = torch.randn(22, num_features, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ids = torch.tensor([0, 10, 11, 21, 5, 22, -1, -(2**40), 2**62, 5], device=device)
    parts = [embed(ids, table[first : first + 11], first) for first in (0, 11)]
    inside = (ids >= 0) & (ids < 22)
    expected = F.embedding(ids.clamp(0, 21), table) * inside[:, None]
    assert torch.equal(parts[0] + parts[1], expected)
    for first, part in zip((0, 11), parts, strict=True):
        foreign = (ids < first) | (ids >= first + 11)
        assert not part[foreign].any()


def test_scale_is_applied_in_fp32_and_rounded_once(device, dtype):
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    ids = torch.tensor([3, 8, 0], device=device)
    scale = float(torch.tensor(40**0.5, dtype=dtype))
    assert torch.equal(embed(ids, weight, scale=scale), (weight[ids].float() * scale).to(dtype))


def test_rows_with_gaps_and_no_tokens(device):
    weight = torch.randn(5, 32, device=device)[:, :20]
    ids = torch.tensor([4, 1], dtype=torch.int64, device=device)
    assert torch.equal(embed(ids, weight), weight[ids])
    assert embed(ids[:0], weight).shape == (0, 20)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        embed(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 4))


def test_cost():
    assert embed_cost(3, 8, torch.bfloat16) == (96, 24)
