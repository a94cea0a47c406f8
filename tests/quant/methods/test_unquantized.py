"""The arithmetic between a layer's features and the tensors that store them, and the plain method."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.quant.methods.linear_method import WeightSpec
from shoal.quant.methods.unquantized import UnquantizedLinear

PLAIN = WeightSpec("weight", torch.float32, out_axis=0, in_axis=1)
PACKED_ALONG_IN = WeightSpec("weight_packed", torch.int32, out_axis=0, in_axis=1, in_unit=8)
TRANSPOSED = WeightSpec("qweight", torch.int32, out_axis=1, in_axis=0, out_unit=8)
PER_CHANNEL = WeightSpec("weight_scale", torch.float32, out_axis=0, in_axis=None)


@pytest.mark.parametrize(
    ("spec", "shape"), [(PLAIN, (48, 32)), (PACKED_ALONG_IN, (48, 4)), (TRANSPOSED, (32, 6)), (PER_CHANNEL, (48,))]
)
def test_parts_tile_the_tensor(spec, shape):
    """Whatever the layout, the parts of two output and two input halves cover each element once."""
    assert spec.shape(48, 32) == shape
    covered = torch.zeros(shape)
    halves = [slice(0, 16), slice(16, 32)] if spec.in_axis is not None else [slice(0, 32)]
    for outputs in (slice(0, 24), slice(24, 48)):
        for inputs in halves:
            part = covered[spec.index(outputs, inputs)]
            assert tuple(part.shape) == spec.shape(24, inputs.stop - inputs.start)
            part += 1
    assert torch.equal(covered, torch.ones(shape))


def test_a_unit_is_never_cut():
    with pytest.raises(ValueError, match=r"weight_packed axis 1 stores 8 features together.*4\.\.12"):
        PACKED_ALONG_IN.index(slice(0, 48), slice(4, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 7, 65])
def test_the_plain_method_is_a_linear_layer(num_tokens, bias, dtype):
    torch.manual_seed(0)
    method = UnquantizedLinear()
    assert method.specs(dtype) == (WeightSpec("weight", dtype, out_axis=0, in_axis=1),)
    weight, offset = torch.randn(24, 40, dtype=dtype), torch.randn(24, dtype=dtype) if bias else None
    x = torch.randn(num_tokens, 40, dtype=dtype)
    got = method.apply(method.prepare({"weight": weight}), x, offset)
    want = F.linear(x.float(), weight.float(), None if offset is None else offset.float())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-1
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
    assert got.dtype == dtype
