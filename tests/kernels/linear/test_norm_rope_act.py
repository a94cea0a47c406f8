"""Element-wise kernels against their fp32 formulas and against independent ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.kernels.attention.rope import rope, rope_cost, rope_ref, rope_rows
from shoal.kernels.linear.rms_norm import (
    add_rms_norm,
    add_rms_norm_cost,
    add_rms_norm_ref,
    rms_norm,
    rms_norm_cost,
    rms_norm_ref,
)
from shoal.kernels.linear.silu_mul import ACTIVATIONS, silu_mul, silu_mul_cost, silu_mul_ref
from tests.support.rope import rope_cache

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 256), (2, 3, 33), (2, 2100), (0, 8)])
def test_rms_norm(shape, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    assert_close(got, rms_norm_ref(x, weight, 1e-5))
    assert_close(got, F.rms_norm(x.float(), shape[-1:], weight.float(), 1e-5).to(dtype))


def test_rms_norm_of_a_view_with_an_fp32_weight_keeps_the_dtype(dtype, device):
    """Gemma's 1 + w stays fp32 beside a bf16 model, and q/k norms see a part of the fused projection."""
    fused = torch.randn(5, 7, 18, dtype=dtype, device=device)
    x, weight = fused[:, 2:5], 1 + 0.01 * torch.randn(18, device=device)
    got = rms_norm(x, weight, 1e-6)
    assert got.dtype == dtype
    assert_close(got, rms_norm_ref(x, weight, 1e-6))
    assert_close(rms_norm(x[:, 0], weight, 1e-6), got[:, 0])
    whole = torch.ones(3 * 18, device=device)
    assert_close(rms_norm(x.flatten(1), whole, 1e-6), rms_norm_ref(x.flatten(1), whole, 1e-6))
    residual = torch.randn(5, 3, 18, dtype=dtype, device=device)
    want, total = add_rms_norm_ref(x, residual, weight, 1e-6)
    assert_close(add_rms_norm(x, residual, weight, 1e-6), want)
    assert torch.equal(residual, total)


def test_rms_norm_of_zeros_is_zero(device):
    zeros = torch.zeros(2, 8, device=device)
    assert torch.equal(rms_norm(zeros, torch.ones(8, device=device), 1e-6), zeros)


@pytest.mark.parametrize("size", [24, 1040])
def test_a_row_is_normed_alike_in_any_batch(size, device):
    x, weight = torch.randn(9, size, device=device), torch.randn(size, device=device)
    alone = torch.cat([rms_norm(row, weight, 1e-6) for row in x.split(1)])
    assert torch.equal(rms_norm(x, weight, 1e-6), alone)


@pytest.mark.parametrize("shape", [(5, 24), (3, 700), (2, 3, 9)])
def test_add_rms_norm_adds_in_place(shape, dtype, device):
    x, residual = torch.randn(2, *shape, dtype=dtype, device=device).unbind()
    weight = torch.randn(shape[-1], dtype=dtype, device=device)
    want, total = add_rms_norm_ref(x, residual, weight, 1e-5)
    before = x.clone()
    assert_close(add_rms_norm(x, residual, weight, 1e-5), want)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)


def test_norms_refuse_shapes_that_do_not_fit(device):
    x, weight = torch.randn(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match="7 features"):
        rms_norm(x[:, :7], weight, 1e-6)
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(x, x[:1], weight, 1e-6)
    with pytest.raises(ValueError, match="weight has shape"):
        add_rms_norm(x, x.clone(), weight[:7], 1e-6)


@pytest.mark.parametrize(("num_rotated", "head_dim"), [(8, 8), (6, 8), (2, 5), (24, 24)])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_rope_rotates_part_of_each_head_of_a_view(num_heads, num_rotated, head_dim, dtype, device):
    cache = rope_cache(50, num_rotated).to(device)
    positions = torch.tensor([0, 49, 7, 7], device=device)
    fused = torch.randn(4, num_heads + 2, head_dim, dtype=dtype, device=device)
    want = rope_ref(fused[:, :num_heads], cache, positions)
    rest = fused[:, num_heads:].clone()
    got = rope(fused[:, :num_heads], rope_rows(cache, positions, dtype))
    assert_close(got, want)
    assert torch.equal(fused[:, :num_heads], got)  # in place
    assert torch.equal(fused[:, num_heads:], rest)


def test_rope_of_more_heads_than_a_program_takes(device):
    cache, positions = rope_cache(9, 128).to(device), torch.tensor([8, 1], device=device)
    x = torch.randn(2, 11, 128, device=device)
    assert_close(rope(x.clone(), rope_rows(cache, positions, x.dtype)), rope_ref(x, cache, positions))


def test_rope_is_a_rotation_by_the_position(device):
    """As complex numbers: x[i] + j x[i + R/2] times e^(j angle)."""
    cache, positions = rope_cache(20, 8).to(device), torch.tensor([3, 19], device=device)
    x = torch.randn(2, 1, 8, device=device)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    turned = pairs * torch.complex(cache[positions, :4].double(), cache[positions, 4:].double())[:, None]
    got = rope(x.clone(), rope_rows(cache, positions, torch.float32))
    torch.testing.assert_close(got.double(), torch.cat((turned.real, turned.imag), -1), rtol=1e-6, atol=1e-6)


def test_rope_refuses_a_head_smaller_than_what_is_rotated(device):
    rows = rope_rows(rope_cache(4, 8).to(device), torch.tensor([0], device=device), torch.float32)
    with pytest.raises(ValueError, match="head_dim >= 8"):
        rope(torch.randn(1, 2, 6, device=device), rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (2, 5, 66), (2, 2100), (0, 6)])
def test_silu_mul(shape, activation, dtype, device):
    x = 3 * torch.randn(shape, dtype=dtype, device=device)
    before = x.clone()
    got = silu_mul(x, activation)
    torch.testing.assert_close(got, silu_mul_ref(x, activation), rtol=4 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_silu_mul_of_extreme_gates(activation, device):
    """What exp overflows or underflows for: the gate lets all through, or nothing."""
    gate, up = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=device), torch.full((1, 5), 2.0, device=device)
    want = torch.tensor([[0.0, 0.0, 0.0, 200.0, 2e4]], device=device)
    torch.testing.assert_close(silu_mul(torch.cat((gate, up), -1), activation), want, rtol=1e-6, atol=1e-30)


def test_silu_mul_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="relu"):
        silu_mul(torch.randn(2, 4), "relu")
    with pytest.raises(ValueError, match="even"):
        silu_mul(torch.randn(2, 5))


def test_costs_are_those_of_the_tensors():
    x = torch.empty(3, 64, dtype=torch.bfloat16)
    assert rms_norm_cost(3, 64, x.dtype)[0] == 2 * x.nbytes
    assert add_rms_norm_cost(3, 64, x.dtype)[0] == 4 * x.nbytes
    assert silu_mul_cost(3, 32, x.dtype)[0] == x.nbytes + x.nbytes // 2
    assert rope_cost(3, 4, 16, x.dtype)[0] == 2 * x.nbytes + 3 * rope_cache(1, 16).nbytes
