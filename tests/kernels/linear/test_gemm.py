"""The matrix product of linear layers: every launch against the fp32 formula, and rows that know nothing of others."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of
from shoal.kernels.linear.gemm import gated_linear, gated_linear_cost, gated_linear_ref, linear, linear_cost, linear_ref
from shoal.kernels.linear.silu_mul import ACTIVATIONS
from shoal.kernels.tuning import Launch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
MMA = Launch("mma", 16, 16, 32, num_warps=1, num_stages=3)
SPLIT = Launch("mma", 16, 16, 32, splits=3, num_warps=1, num_stages=3)
WIDE = Launch("mma", 64, 16, 64, splits=2, num_warps=4, num_stages=3, prefetch=128)
FMA = Launch("fma", 4, 1, 256, num_warps=1, prefetch=256)


STREAM = Launch("stream", 64, 16, 64, splits=1, num_warps=4, num_stages=3)
STREAM_SPLIT = Launch("stream", 128, 32, 128, splits=3, num_warps=8, num_stages=2)


def operands(num_tokens: int, num_rows: int, num_inputs: int, dtype: torch.dtype, device: torch.device):
    x = torch.randn(num_tokens, num_inputs, dtype=dtype, device=device)
    weight = torch.randn(num_rows, num_inputs, dtype=dtype, device=device) / num_inputs**0.5
    return x, weight, torch.randn(num_rows, dtype=dtype, device=device)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=TOLERANCE[want.dtype], atol=TOLERANCE[want.dtype])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("shape", [(1, 12, 40), (3, 40, 72), (17, 10, 33), (0, 8, 16), (1, 6, 7)])
def test_linear(shape, invariant, dtype, device):
    x, weight, bias = operands(*shape, dtype, device)
    assert_close(linear(x, weight, invariant=invariant), linear_ref(x, weight))
    assert_close(linear(x, weight, bias, invariant=invariant), linear_ref(x, weight, bias))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 24, 40), (5, 36, 33), (0, 8, 16)])
def test_gated_linear(shape, activation, invariant, dtype, device):
    x, weight, bias = operands(*shape, dtype, device)
    got = gated_linear(x, weight, activation, bias, invariant=invariant)
    assert got.shape == (shape[0], shape[1] // 2)
    assert_close(got, gated_linear_ref(x, weight, activation, bias))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("launch", "shape"),
    [
        (FMA, (1, 10, 264)),
        (FMA, (1, 3, 256)),
        (MMA, (5, 20, 72)),
        (MMA, (33, 16, 31)),  # rows that are no multiple of 16 bytes
        (SPLIT, (18, 20, 104)),
        (SPLIT, (2, 20, 40)),  # fewer steps than splits
        (WIDE, (9, 70, 136)),
        (STREAM, (9, 70, 136)),
        (STREAM, (33, 64, 1024)),
        (STREAM_SPLIT, (40, 200, 1032)),
        (STREAM_SPLIT, (2, 20, 40)),
    ],
)
def test_every_way_to_launch(launch, shape, gated, dtype, device):
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH or (launch is FMA and dtype == torch.float32):
        pytest.skip("torch has one way, and one token in fp32 is not for this kernel")
    if launch.kernel == "stream" and (device.type != "cuda" or dtype == torch.float32):
        pytest.skip("Gluon is not interpreted, and wgmma would round fp32")
    from shoal.kernels.linear.gemm_triton import gemm_triton

    num_tokens, num_outputs, num_inputs = shape
    x, weight, bias = operands(num_tokens, num_outputs * (2 if gated else 1), num_inputs, dtype, device)
    for _ in range(2):  # a split product leaves its counters as it found them
        got = gemm_triton(x, weight, bias, "silu" if gated else None, launch)
        assert_close(got, gated_linear_ref(x, weight, "silu", bias) if gated else linear_ref(x, weight, bias))


def test_a_view_of_a_wider_tensor(dtype, device):
    wide, weight, _ = operands(4, 24, 64, dtype, device)
    wide = torch.cat((wide, wide), 1)
    assert_close(linear(wide[:, :64], weight, invariant=True), linear_ref(wide[:, :64], weight))


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_of_an_invariant_product_has_the_same_bits_in_any_batch(gated, dtype, device):
    """Whatever the others are, NaN or not, how many, and where it stands among them.

    The interpreter multiplies tiles by numpy, whose order of sums depends on the row: there the sums are exact ones.
    """
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        pytest.skip("the CPU takes another path, tested in test_batch_independence.py")
    on_gpu = device.type == "cuda"
    num_tokens, num_inputs = (300, 2048) if on_gpu else (40, 72)
    x, weight, bias = operands(num_tokens, 72, num_inputs, dtype, device)
    if not on_gpu:
        x, weight, bias = x.round(), (4 * weight).round(), bias.round()

    def product(rows: torch.Tensor) -> torch.Tensor:
        if gated:
            return gated_linear(rows, weight, "silu", bias, invariant=True)
        return linear(rows, weight, bias, invariant=True)

    whole = product(x)
    for first, last in ((0, 1), (num_tokens - 1, num_tokens), (7, 24), (3, num_tokens)):
        assert torch.equal(product(x[first:last]), whole[first:last])
    assert torch.equal(product(x.flip(0)).flip(0), whole)
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    assert torch.equal(product(poisoned)[::2], whole[::2])


def test_what_does_not_fit_is_refused(device):
    x, weight, bias = operands(2, 8, 16, torch.float32, device)
    with pytest.raises(ValueError, match=r"\[2, 15\]"):
        linear(x[:, :15], weight)
    with pytest.raises(ValueError, match="one dtype"):
        linear(x, weight.half())
    with pytest.raises(ValueError, match=r"takes \[8\]"):
        linear(x, weight, bias[:7])
    with pytest.raises(ValueError, match="even number"):
        gated_linear(x, weight[:7])
    with pytest.raises(ValueError, match="relu"):
        gated_linear(x, weight, "relu")


def test_costs_are_those_of_the_tensors():
    x, weight, y = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((3, 64), (48, 64), (3, 48)))
    assert linear_cost(3, 48, 64, x.dtype) == (x.nbytes + weight.nbytes + y.nbytes, 2 * 3 * 48 * 64)
    assert gated_linear_cost(3, 24, 64, x.dtype)[0] == x.nbytes + weight.nbytes + y.nbytes // 2
