"""Element-wise kernels against their fp32 formulas and against independent ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.kernels.block_copy import block_copy, block_copy_ref
from shoal.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref
from shoal.kernels.rope import rope, rope_ref, rope_rows
from shoal.kernels.silu_mul import ACTIVATIONS, silu_mul, silu_mul_ref

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 256), (2, 3, 33)])
def test_rms_norm(shape, dtype):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    assert_close(got, rms_norm_ref(x, weight, 1e-5))
    assert_close(got, F.rms_norm(x.float(), shape[-1:], weight.float(), 1e-5).to(dtype))


def test_rms_norm_of_a_view_with_an_fp32_weight_keeps_the_dtype():
    """Gemma's 1 + w stays fp32 beside a bf16 model, and q/k norms see a part of the fused projection."""
    fused = torch.randn(4, 96, dtype=torch.bfloat16)
    x, weight = fused[:, 32:64].view(4, 2, 16), 1 + 0.01 * torch.randn(16)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == torch.bfloat16
    assert_close(got, rms_norm_ref(x, weight, 1e-6))


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_add_rms_norm_adds_in_place(dtype):
    x, residual, weight = torch.randn(5, 24, dtype=dtype), torch.randn(5, 24, dtype=dtype), torch.randn(24, dtype=dtype)
    want, total = add_rms_norm_ref(x, residual, weight, 1e-5)
    before = x.clone()
    assert_close(add_rms_norm(x, residual, weight, 1e-5), want)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)


def test_norms_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="7 features"):
        rms_norm(torch.randn(2, 7), torch.ones(8), 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.randn(2, 8), torch.randn(3, 8), torch.ones(8), 1e-6)


def _cache(num_positions: int, num_rotated: int) -> torch.Tensor:
    angles = torch.arange(num_positions)[:, None] / 100.0 ** (torch.arange(0, num_rotated, 2) / num_rotated)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_rotated", "head_dim"), [(8, 8), (6, 8), (2, 5), (24, 24)])
def test_rope_rotates_part_of_each_head_of_a_view(num_rotated, head_dim, dtype):
    cache, positions = _cache(50, num_rotated), torch.tensor([0, 49, 7, 7])
    fused = torch.randn(4, 5, head_dim, dtype=dtype)
    want = rope_ref(fused[:, :3], cache, positions)
    rest = fused[:, 3:].clone()
    got = rope(fused[:, :3], rope_rows(cache, positions, dtype))
    assert_close(got, want)
    assert torch.equal(fused[:, :3], got)  # in place
    assert torch.equal(fused[:, 3:], rest)


def test_rope_is_a_rotation_by_the_position():
    """As complex numbers: x[i] + j x[i + R/2] times e^(j angle)."""
    cache, positions = _cache(20, 8), torch.tensor([3, 19])
    x = torch.randn(2, 1, 8)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    turned = pairs * torch.complex(cache[positions, :4].double(), cache[positions, 4:].double())[:, None]
    got = rope(x.clone(), rope_rows(cache, positions, torch.float32))
    torch.testing.assert_close(got.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-6, atol=1e-6)


def test_rope_refuses_a_head_smaller_than_what_is_rotated():
    with pytest.raises(ValueError, match="head_dim >= 8"):
        rope(torch.randn(1, 2, 6), rope_rows(_cache(4, 8), torch.tensor([0]), torch.float32))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 5, 66)])
def test_silu_mul(shape, activation, dtype):
    x = 3 * torch.randn(shape, dtype=dtype)
    before = x.clone()
    got = silu_mul(x, activation)
    torch.testing.assert_close(got, silu_mul_ref(x, activation), rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    assert torch.equal(x, before)


def test_silu_mul_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="relu"):
        silu_mul(torch.randn(2, 4), "relu")
    with pytest.raises(ValueError, match="even"):
        silu_mul(torch.randn(2, 5))


def test_block_copy_reads_every_source_before_it_writes():
    cache = torch.randn(6, 2, 4, 3)
    source, target = torch.tensor([0, 1, 5]), torch.tensor([1, 0, 3])
    want = block_copy_ref(cache, source, target)
    block_copy(cache, source, target)
    assert torch.equal(cache, want)
    with pytest.raises(ValueError, match="equal vectors"):
        block_copy(cache, source, target[:2])
