"""Expert routing and grouped expert MLPs against token-by-token fp32."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.backend import Backend, backend_of
from shoal.kernels.moe.expected_experts import expected_experts
from shoal.kernels.moe.moe import moe_mlp, moe_mlp_cost, moe_mlp_ref, route, route_cost, route_ref

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest result


def _weights(num_experts, num_hidden, num_inner, device, dtype):
    gate_up = torch.randn(num_experts, 2 * num_inner, num_hidden, device=device) * num_hidden**-0.5
    down = torch.randn(num_experts, num_hidden, num_inner, device=device) * num_inner**-0.5
    return gate_up.to(dtype), down.to(dtype)


def _assert_close(got, want, dtype):
    assert got.dtype == dtype
    assert (got.float() - want.float()).abs().max() <= TOLERANCE[dtype] * want.abs().max()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 4, 2), (9, 5, 5), (70, 128, 8), (3, 256, 16)])
def test_route_takes_the_largest_probabilities(num_tokens, num_experts, top_k, renormalize, device, dtype):
    torch.manual_seed(num_tokens)
    # Logits in steps of 1/8 that the tokens' own order shuffles: distinct in every dtype.
    steps = torch.stack([torch.randperm(num_experts) for _ in range(num_tokens)])
    logits = (steps.float() / 8 - num_experts / 16).to(device, dtype)
    weights, experts = route(logits, top_k, renormalize=renormalize)
    want_weights, want_experts = route_ref(logits, top_k, renormalize=renormalize)
    assert experts.dtype == torch.int64
    assert torch.equal(experts, want_experts)
    torch.testing.assert_close(weights, want_weights, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)


def test_of_equal_probabilities_the_kernel_takes_the_lowest_expert_first(device):
    if backend_of(torch.empty(0, device=device)) is Backend.TORCH:
        pytest.skip("the order of torch.topk among equals is its own")
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5], device=device)
    assert route(logits, 4, renormalize=True)[1].tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_a_token_of_nan_gets_distinct_experts_and_leaves_the_others_alone(device):
    logits = torch.randn(5, 6, device=device)
    want = route(logits, 4, renormalize=True)
    logits[1], logits[3] = torch.nan, torch.inf
    weights, experts = route(logits, 4, renormalize=True)
    for row in (0, 2, 4):
        assert torch.equal(weights[row], want[0][row])
        assert torch.equal(experts[row], want[1][row])
    for row in (1, 3):
        chosen = experts[row].tolist()
        assert len(set(chosen)) == 4
        assert set(chosen) <= set(range(6))


def test_route_refuses_more_experts_than_there_are():
    with pytest.raises(ValueError, match=r"1\.\.4"):
        route(torch.zeros(1, 4), 5, renormalize=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "num_hidden", "num_inner"),
    [
        (1, 3, 1, 10, 7),
        (1, 9, 4, 300, 33),
        (5, 4, 2, 40, 33),
        (17, 9, 4, 20, 10),
        (70, 2, 1, 16, 16),
        (130, 5, 3, 24, 8),
    ],
)
def test_moe_mlp(num_tokens, num_experts, top_k, num_hidden, num_inner, activation, device, dtype):
    torch.manual_seed(3)
    x = torch.randn(num_tokens, num_hidden, device=device).to(dtype)
    gate_up, down = _weights(num_experts, num_hidden, num_inner, device, dtype)
    logits = torch.randn(num_tokens, num_experts, device=device).to(dtype)
    weights, experts = route(logits, top_k, renormalize=False)
    got = moe_mlp(x, gate_up, down, weights, experts, activation)
    want = moe_mlp_ref(x.float(), gate_up.float(), down.float(), weights.float(), experts, activation)
    _assert_close(got, want, dtype)


def test_all_tokens_on_one_expert(device, dtype):
    torch.manual_seed(4)
    x = torch.randn(75, 16, device=device).to(dtype)
    gate_up, down = _weights(6, 16, 20, device, dtype)
    gate_up[3:], down[3:] = torch.nan, torch.nan  # never run
    experts = torch.tensor([[2]], device=device).expand(75, 1)
    weights = torch.rand(75, 1, device=device).to(dtype)
    want = moe_mlp_ref(x.float(), gate_up.float(), down.float(), weights.float(), experts)
    _assert_close(moe_mlp(x, gate_up, down, weights, experts), want, dtype)


def test_rows_with_gaps_between_them(device):
    wide = torch.randn(9, 30, device=device)
    gate_up, down = _weights(3, 20, 12, device, torch.float32)
    weights, experts = route(torch.randn(9, 3, device=device), 2, renormalize=True)
    got = moe_mlp(wide[:, 5:25], gate_up, down, weights, experts)
    assert torch.equal(got, moe_mlp(wide[:, 5:25].contiguous(), gate_up, down, weights, experts))


def test_padding_of_nan_changes_no_other_token(device, dtype):
    torch.manual_seed(5)
    x = torch.randn(20, 24, device=device).to(dtype)
    gate_up, down = _weights(3, 24, 16, device, dtype)
    weights, experts = route(torch.randn(20, 3, device=device).to(dtype), 2, renormalize=True)
    want = moe_mlp(x, gate_up, down, weights, experts, invariant=True)
    padding = torch.arange(20, device=device) % 3 == 1
    x[padding], weights[padding] = torch.nan, torch.nan
    got = moe_mlp(x, gate_up, down, weights, experts, invariant=True)
    assert torch.equal(got[~padding], want[~padding])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_token_is_the_same_alone_and_in_any_batch(dtype, device):
    backend = backend_of(torch.empty(0, device=device))
    if backend is Backend.TORCH or (backend is Backend.INTERPRET and dtype == torch.bfloat16):
        pytest.skip("a promise of the kernels, in the dtypes that are computed rightly here")
    torch.manual_seed(6)
    x = torch.randn(90, 32, device=device).to(dtype)
    gate_up, down = _weights(4, 32, 24, device, dtype)
    weights, experts = route(torch.randn(90, 4, device=device).to(dtype), 2, renormalize=True)
    whole = moe_mlp(x, gate_up, down, weights, experts, invariant=True)
    for rows in (slice(7, 8), slice(40, 57), slice(0, 64)):
        part = moe_mlp(x[rows], gate_up, down, weights[rows], experts[rows], invariant=True)
        assert torch.equal(part, whole[rows])


def test_no_tokens(device):
    gate_up, down = _weights(3, 8, 4, device, torch.float32)
    weights, experts = route(torch.zeros(0, 3, device=device), 2, renormalize=True)
    assert moe_mlp(torch.zeros(0, 8, device=device), gate_up, down, weights, experts).shape == (0, 8)


@pytest.mark.gpu
def test_in_a_cuda_graph_with_other_choices_at_each_replay():
    torch.manual_seed(7)
    x = torch.randn(33, 64, device="cuda", dtype=torch.bfloat16)
    gate_up, down = _weights(16, 64, 48, "cuda", torch.bfloat16)
    logits = torch.randn(33, 16, device="cuda", dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        weights, experts = route(logits, 4, renormalize=True)
        return moe_mlp(x, gate_up, down, weights, experts)

    forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    for spread in (1.0, 0.0, 5.0):
        logits.copy_(torch.randn(33, 16, device="cuda") * spread)
        graph.replay()
        assert torch.equal(out, forward())


def test_moe_mlp_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="do not fit together"):
        moe_mlp(torch.randn(2, 5), torch.randn(3, 4, 6), torch.randn(3, 5, 2), torch.ones(2, 1), torch.ones(2, 1))
    with pytest.raises(ValueError, match="'relu' is not supported"):
        moe_mlp(
            torch.randn(2, 5), torch.randn(3, 4, 5), torch.randn(3, 5, 2), torch.ones(2, 1), torch.ones(2, 1), "relu"
        )


def test_costs_count_the_experts_that_tokens_are_expected_to_touch():
    assert expected_experts(1, 128, 8) == 8
    assert expected_experts(10_000, 8, 2) == 8
    choices = torch.rand(400, 16, 32).topk(4).indices.flatten(1)
    touched = sum(len(row.unique()) for row in choices) / 400
    assert expected_experts(16, 32, 4) == pytest.approx(touched, rel=0.02)
    assert moe_mlp_cost(1, 8, 2, 4096, 14336, torch.bfloat16) == (
        2 * (2 * 3 * 4096 * 14336 + 2 * 4096),
        2 * 2 * 3 * 4096 * 14336,
    )
    assert route_cost(10, 8, 2, torch.float32) == (10 * 8 * 4 + 20 * 12, 6 * 80)
