"""Triton kernels of moe.py: the two GEMMs of every chosen expert, and the sum of a token's experts.

Legend as in moe.py, S = T * k slots; `order` and `tiles` as in moe_route_triton.py. hidden [S, I] is in
sorted order. parts [S, H] is in slot order; a third kernel adds a token's k rows in a fixed order in fp32.

Weights are the left operand: acc [features, rows] = W [features, inner] @ X^T [inner, rows]. Hopper's
tensor cores take 64 left rows and as few as 8 right columns. A padding row, possibly NaN, is a column of
acc and affects no other. Blocks come by TMA where strides allow it, except the gathered rows of x: 1 to 20
% of a GEMM's time on an H200, growing with rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops_triton import activate
from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from .expected_experts import expected_experts
from .moe_route_triton import most_tiles, sort_by_expert

COMBINE_N, COMBINE_WARPS = 1024, 4  # 16 bytes of bf16 per thread and expert


@triton.jit
def _program_tile(max_tiles, num_features, BLOCK_FEATURES: tl.constexpr, GROUP: tl.constexpr):
    """(tile, block of features). GROUP tiles share a block of weights in L2 before the next is read."""
    num_blocks = tl.cdiv(num_features, BLOCK_FEATURES)
    program = tl.program_id(0)
    first = program // (GROUP * num_blocks) * GROUP
    size = tl.minimum(max_tiles - first, GROUP)
    within = program % (GROUP * num_blocks)
    return first + within % size, within // size


@triton.jit
def _load_block(
    source,  # [rows, num_columns]: a descriptor, or a pointer
    row,
    column,
    last_row,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """The block at (row, column), zero beyond the last column. Rows beyond last_row are unused."""
    if TMA:
        return source.load([row, column])
    else:
        rows, columns = tl.minimum(row + tl.arange(0, ROWS), last_row), column + tl.arange(0, COLUMNS)
        ptrs = source + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        return tl.load(ptrs, mask=(columns < num_columns)[None, :], other=0.0)


@triton.jit(do_not_specialize=["max_tiles"])
def _gate_up_experts_kernel(
    x_ptr,
    gate_up,
    hidden_ptr,
    order_ptr,
    tiles_ptr,
    stride_x,
    max_tiles,
    num_features,
    num_inner,
    TOP_K: tl.constexpr,
    GELU: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden[r] = act(gate_up[e, :I] @ x[t]) * (gate_up[e, I:] @ x[t]), t the token of sorted row r."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    tile, block = _program_tile(max_tiles, num_features, BLOCK_FEATURES, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    if tile >= tl.load(tiles_ptr):
        return
    expert = tl.load(tiles_ptr + 1 + tile)
    rows = tl.load(tiles_ptr + 1 + max_tiles + tile) + tl.arange(0, BLOCK_ROWS)
    end = tl.load(tiles_ptr + 1 + 2 * max_tiles + tile)
    live = rows < end
    tokens = tl.load(order_ptr + rows, mask=live, other=0) // TOP_K
    inner = tl.arange(0, BLOCK_INNER)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_x + inner[None, :]
    row = expert * (2 * num_features) + block * BLOCK_FEATURES
    last_row = (expert + 1) * (2 * num_features) - 1
    gate = tl.zeros([BLOCK_FEATURES, BLOCK_ROWS], tl.float32)
    up = tl.zeros([BLOCK_FEATURES, BLOCK_ROWS], tl.float32)
    for start in range(0, num_inner, BLOCK_INNER):
        mask = live[:, None] & (inner < num_inner - start)[None, :]
        x = tl.load(x_ptrs + start, mask=mask, other=0.0)
        w_gate = _load_block(gate_up, row, start, last_row, num_inner, BLOCK_FEATURES, BLOCK_INNER, TMA)
        w_up = _load_block(gate_up, row + num_features, start, last_row, num_inner, BLOCK_FEATURES, BLOCK_INNER, TMA)
        gate = tl.dot(w_gate, tl.trans(x), gate, input_precision="ieee")
        up = tl.dot(w_up, tl.trans(x), up, input_precision="ieee")
    y = tl.trans(activate(gate, up, GELU).to(hidden_ptr.dtype.element_ty))
    features = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    out_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * num_features + features[None, :]
    tl.store(out_ptrs, y, mask=live[:, None] & (features < num_features)[None, :])


@triton.jit(do_not_specialize=["max_tiles", "num_slots"])
def _down_experts_kernel(
    hidden,
    down,
    scale_ptr,
    parts_ptr,
    order_ptr,
    tiles_ptr,
    num_slots,
    max_tiles,
    num_features,
    num_inner,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_FEATURES: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """parts[s] = weights[s] * (down[e] @ hidden[r]), s the slot of sorted row r."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    tile, block = _program_tile(max_tiles, num_features, BLOCK_FEATURES, GROUP)  # pyright: ignore[reportGeneralTypeIssues]
    if tile >= tl.load(tiles_ptr):
        return
    expert = tl.load(tiles_ptr + 1 + tile)
    first = tl.load(tiles_ptr + 1 + max_tiles + tile)
    end = tl.load(tiles_ptr + 1 + 2 * max_tiles + tile)
    row = expert * num_features + block * BLOCK_FEATURES
    last_row = (expert + 1) * num_features - 1
    acc = tl.zeros([BLOCK_FEATURES, BLOCK_ROWS], tl.float32)
    for start in range(0, num_inner, BLOCK_INNER):
        x = _load_block(hidden, first, start, num_slots - 1, num_inner, BLOCK_ROWS, BLOCK_INNER, TMA)
        w = _load_block(down, row, start, last_row, num_inner, BLOCK_FEATURES, BLOCK_INNER, TMA)
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    rows = first + tl.arange(0, BLOCK_ROWS)
    live = rows < end
    slots = tl.load(order_ptr + rows, mask=live, other=0).to(tl.int64)
    scale = tl.load(scale_ptr + slots).to(tl.float32)
    y = tl.trans((acc * scale[None, :]).to(parts_ptr.dtype.element_ty))
    features = block * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    out_ptrs = parts_ptr + slots[:, None] * num_features + features[None, :]
    tl.store(out_ptrs, y, mask=live[:, None] & (features < num_features)[None, :])


@triton.jit
def _combine_experts_kernel(
    parts_ptr, out_ptr, num_features, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr
):
    """out[t] = the sum of parts[t * k .. t * k + k - 1], in order."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < num_features
    part_ptrs = parts_ptr + token * (TOP_K * num_features) + columns
    total = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.static_range(TOP_K):
        total += tl.load(part_ptrs + i * num_features, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * num_features + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class MoeLaunch:
    """Rows of a tile, and the launch parameters of the two GEMMs."""

    tile_rows: int
    gate_up: dict[str, int]
    down: dict[str, int]


def _gemm(features: int, inner: int, num_warps: int, num_stages: int, group: int) -> dict[str, int]:
    return {
        "BLOCK_FEATURES": features, "BLOCK_INNER": inner, "GROUP": group,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


# Rows of a tile -> the two GEMMs, tuned on an H200 for Mixtral-8x7B and Qwen3-30B-A3B. Few rows are memory
# bound: small blocks, many programs. Many rows: accumulators of 2 x 128 x 128 or 256 x 128 on eight warps
# keep wgmma fed from 4 x 48 KB of stages.
_PRODUCTS = {
    16: (_gemm(64, 128, 4, 3, 64), _gemm(64, 128, 4, 4, 64)),
    32: (_gemm(64, 64, 4, 4, 64), _gemm(64, 128, 4, 4, 64)),
    64: (_gemm(128, 64, 8, 4, 16), _gemm(256, 64, 8, 4, 16)),
    128: (_gemm(128, 64, 8, 4, 16), _gemm(256, 64, 8, 4, 16)),
}
_FP32 = (_gemm(32, 32, 4, 2, 16), _gemm(32, 32, 4, 2, 16))  # on CUDA cores, unrolled: larger tiles would spill
_INVARIANT = MoeLaunch(64, _gemm(64, 64, 4, 4, 16), _gemm(128, 64, 4, 4, 16))


def moe_launch(num_tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, *, invariant: bool) -> MoeLaunch:
    """Tiles of at least 4/3 of an expert's expected rows, at most 128."""
    if dtype == torch.float32:
        return MoeLaunch(16, *_FP32)
    if invariant:
        return _INVARIANT
    rows = num_tokens * top_k / expected_experts(num_tokens, num_experts, top_k)
    tile_rows = 16 if rows <= 6 else 32 if rows <= 24 else 64 if rows <= 48 else 128
    return MoeLaunch(tile_rows, *_PRODUCTS[tile_rows])


def _in_blocks(matrices: list[tuple[torch.Tensor, tuple[int, int]]]) -> tuple[list[Any], bool]:
    """(block descriptors, True) where TMA can read all, else (the matrices, False)."""
    if any(each.data_ptr() % 16 or each.shape[1] * each.itemsize % 16 for each, _ in matrices):
        return [each for each, _ in matrices], False
    return [TensorDescriptor.from_tensor(each, list(block)) for each, block in matrices], True


def moe_mlp_triton(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    experts: torch.Tensor,
    activation: str,
    *,
    invariant: bool,
    launch: MoeLaunch | None = None,
) -> torch.Tensor:
    """`moe_mlp` for checked shapes. `launch` overrides the default."""
    num_tokens, num_hidden = x.shape
    num_experts, _, num_inner = down.shape
    top_k = experts.shape[1]
    out = torch.empty(num_tokens, num_hidden, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    num_slots, pdl = num_tokens * top_k, pdl_launch(x)
    launch = launch or moe_launch(num_tokens, num_experts, top_k, x.dtype, invariant=invariant)
    order, tiles = sort_by_expert(experts.contiguous(), num_experts, launch.tile_rows)
    max_tiles = most_tiles(num_slots, num_experts, launch.tile_rows)
    hidden = torch.empty(num_slots, num_inner, dtype=x.dtype, device=x.device)
    parts = torch.empty(num_slots, num_hidden, dtype=x.dtype, device=x.device)

    product: dict[str, Any] = {"BLOCK_ROWS": launch.tile_rows, **launch.gate_up, **pdl}
    product |= {"TOP_K": top_k, "GELU": activation != "silu"}
    features, inner = product["BLOCK_FEATURES"], product["BLOCK_INNER"]
    (weight,), product["TMA"] = _in_blocks([(gate_up.view(-1, num_hidden), (features, inner))])
    launch_kernel(
        _gate_up_experts_kernel,
        (max_tiles * triton.cdiv(num_inner, features),),
        (x, weight, hidden, order, tiles, x.stride(0), max_tiles, num_inner, num_hidden),
        **product,
    )
    product = {"BLOCK_ROWS": launch.tile_rows, **launch.down, **pdl}
    features, inner = product["BLOCK_FEATURES"], product["BLOCK_INNER"]
    (rows, weight), product["TMA"] = _in_blocks(
        [(hidden, (launch.tile_rows, inner)), (down.view(-1, num_inner), (features, inner))]
    )
    launch_kernel(
        _down_experts_kernel,
        (max_tiles * triton.cdiv(num_hidden, features),),
        (rows, weight, weights.contiguous(), parts, order, tiles, num_slots, max_tiles, num_hidden, num_inner),
        **product,
    )
    launch_kernel(
        _combine_experts_kernel,
        (num_tokens, triton.cdiv(num_hidden, COMBINE_N)),
        (parts, out, num_hidden),
        TOP_K=top_k,
        BLOCK_N=COMBINE_N,
        num_warps=COMBINE_WARPS,
        **pdl,
    )
    return out
