"""Expert routing and grouped expert MLPs against token-by-token fp32."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.moe import moe_mlp, moe_mlp_ref, route


@pytest.mark.parametrize("renormalize", [True, False])
def test_route_takes_the_largest_probabilities(renormalize):
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 4.0]])
    weights, experts = route(logits, 2, renormalize=renormalize)
    assert experts.tolist() == [[1, 2], [3, 0]]
    chosen = logits.softmax(-1).gather(1, experts)
    want = chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen
    torch.testing.assert_close(weights, want)


def test_route_refuses_more_experts_than_there_are():
    with pytest.raises(ValueError, match=r"1\.\.4"):
        route(torch.zeros(1, 4), 5, renormalize=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 3, 1), (5, 4, 2), (17, 9, 4)])
def test_moe_mlp(num_tokens, num_experts, top_k, activation):
    torch.manual_seed(3)
    x = torch.randn(num_tokens, 10)
    gate_up, down = 0.3 * torch.randn(num_experts, 14, 10), 0.3 * torch.randn(num_experts, 10, 7)
    weights, experts = route(torch.randn(num_tokens, num_experts), top_k, renormalize=False)
    got = moe_mlp(x, gate_up, down, weights, experts, activation)
    torch.testing.assert_close(got, moe_mlp_ref(x, gate_up, down, weights, experts, activation), rtol=1e-5, atol=1e-6)


def test_an_expert_that_no_token_chose_is_never_run():
    gate_up, down = torch.randn(3, 4, 5), torch.randn(3, 5, 2)
    gate_up[1], down[1] = torch.nan, torch.nan
    experts = torch.tensor([[0, 2], [2, 0]])
    assert moe_mlp(torch.randn(2, 5), gate_up, down, torch.full((2, 2), 0.5), experts).isfinite().all()


def test_moe_mlp_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit together"):
        moe_mlp(torch.randn(2, 5), torch.randn(3, 4, 6), torch.randn(3, 5, 2), torch.ones(2, 1), torch.ones(2, 1))
