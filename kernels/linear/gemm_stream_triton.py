"""Hopper kernel of gemm.py for few tokens, in Gluon: acc[BLOCK_N, BLOCK_T] = W @ X^T, as in gemm_triton.py.

TMA loads tiles of W and X into a ring of STAGES shared-memory buffers for wgmma. Gluon can issue the loads of
W, a constant, before the kernel waits for its predecessor; Triton's pipeline starts after the wait.
With SPLITS > 1 programs split a tile's inputs; the last to end sums the parts in order. Legend as in gemm.py.
"""

# Gluon's annotations describe its compiler's view of a call, not Python's.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportReturnType=false, reportAssignmentType=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda.gdc import gdc_launch_dependents, gdc_wait

from ..pdl_triton import launch_kernel
from ..tuning import Launch

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the name in Triton 3.6


@gluon.jit
def _activate(gate, up, GELU: gl.constexpr):
    """act(gate) * up; Gluon cannot call `activate` of ops_triton.py."""
    if GELU:
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    else:
        inner = gate
    return gate / (1.0 + gl.exp(-inner)) * up


@gluon.jit
def _send_weights(w_desc, w_ring, slot, bar, n, m, num_outputs, pred, GATED: gl.constexpr):
    """Issue TMA loads of one weight tile, or of gate's and up's; `bar` counts their bytes."""
    if GATED:
        tma.async_copy_global_to_shared(w_desc, [n, m], bar, w_ring.index(2 * slot), pred=pred)
        tma.async_copy_global_to_shared(w_desc, [num_outputs + n, m], bar, w_ring.index(2 * slot + 1), pred=pred)
    else:
        tma.async_copy_global_to_shared(w_desc, [n, m], bar, w_ring.index(slot), pred=pred)


@gluon.jit
def _sum_of_parts(parts, SPLITS: gl.constexpr, SIZE: gl.constexpr):
    """Sum the parts of a tile in split order."""
    acc = gl.load(parts, cache_modifier=".cg")
    for part in gl.static_range(1, SPLITS):
        acc += gl.load(parts + part * SIZE, cache_modifier=".cg")
    return acc


@gluon.jit
def _store_rows(acc, y_ptr, n, t, num_outputs, num_tokens, num_warps: gl.constexpr):
    """Store acc [BLOCK_N, BLOCK_T] to y [T, N], 16 bytes of a token's row at a time."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [BLOCK_N // 8, 256 // BLOCK_N], [1, num_warps], [0, 1])
    rows = n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, OUT))
    tokens = t + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, OUT))
    y = gl.convert_layout(acc.to(y_ptr.dtype.element_ty), OUT)
    mask = (rows < num_outputs)[:, None] & (tokens < num_tokens)[None, :]
    gl.store(y_ptr + tokens.to(gl.int64)[None, :] * num_outputs + rows[:, None], y, mask=mask)


@gluon.jit(do_not_specialize=["num_tokens"])
def _stream_kernel(
    w_desc,
    x_desc,
    bias_ptr,
    y_ptr,
    parts_ptr,
    arrivals_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    GATED: gl.constexpr,
    GELU: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_T: gl.constexpr,
    BLOCK_M: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Program (p, s) computes split s of output tile p, [BLOCK_N, BLOCK_T]."""
    dtype: gl.constexpr = w_desc.dtype
    PARTS: gl.constexpr = 2 if GATED else 1
    BYTES: gl.constexpr = (PARTS * BLOCK_N + BLOCK_T) * BLOCK_M * dtype.primitive_bitwidth // 8
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_T, 16])
    w_ring = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK_N, BLOCK_M], w_desc.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_M], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tile, split = gl.program_id(0), gl.program_id(1)
    num_blocks_t = (num_tokens + BLOCK_T - 1) // BLOCK_T
    n, t = tile // num_blocks_t * BLOCK_N, tile % num_blocks_t * BLOCK_T  # neighbouring programs share weights
    all_steps = (num_inputs + BLOCK_M - 1) // BLOCK_M
    first = all_steps * split // SPLITS
    num_steps = all_steps * (split + 1) // SPLITS - first
    for s in gl.static_range(STAGES):
        mbarrier.init(bars.index(s), count=1)
    fence_async_shared()
    for s in gl.static_range(STAGES):
        mbarrier.expect(bars.index(s), BYTES, pred=s < num_steps)
        _send_weights(w_desc, w_ring, s, bars.index(s), n, (first + s) * BLOCK_M, num_outputs, s < num_steps, GATED)
    gdc_launch_dependents()
    gdc_wait()
    for s in gl.static_range(STAGES):
        m = (first + s) * BLOCK_M
        tma.async_copy_global_to_shared(x_desc, [t, m], bars.index(s), x_ring.index(s), pred=s < num_steps)
    acc = gl.zeros((BLOCK_N, BLOCK_T), gl.float32, ACC)
    acc_up = gl.zeros((BLOCK_N, BLOCK_T), gl.float32, ACC)
    for step in range(num_steps):
        slot = step % STAGES
        bar = bars.index(slot)
        mbarrier.wait(bar, step // STAGES & 1)
        x = x_ring.index(slot).permute((1, 0))
        acc = warpgroup_mma(w_ring.index(slot * PARTS), x, acc, is_async=True)
        if GATED:
            acc_up = warpgroup_mma(w_ring.index(slot * PARTS + 1), x, acc_up, is_async=True)
            acc, acc_up = warpgroup_mma_wait(0, deps=[acc, acc_up])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        barrier()  # all warps have read the buffers before they are refilled
        more = step + STAGES < num_steps
        m = (first + step + STAGES) * BLOCK_M
        mbarrier.expect(bar, BYTES, pred=more)
        _send_weights(w_desc, w_ring, slot, bar, n, m, num_outputs, more, GATED)
        tma.async_copy_global_to_shared(x_desc, [t, m], bar, x_ring.index(slot), pred=more)
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(s))
    rows = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
    is_last = True
    if SPLITS > 1:
        SIZE: gl.constexpr = BLOCK_N * BLOCK_T
        tokens = gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, ACC))
        parts = parts_ptr + tile.to(gl.int64) * (SPLITS * PARTS * SIZE) + rows[:, None] * BLOCK_T + tokens[None, :]
        gl.store(parts + split * SIZE, acc)
        if GATED:
            gl.store(parts + (SPLITS + split) * SIZE, acc_up)
        barrier()  # all threads have stored before the arrival
        is_last = gl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            gl.store(arrivals_ptr + tile, 0)
            acc = _sum_of_parts(parts, SPLITS, SIZE)
            if GATED:
                acc_up = _sum_of_parts(parts + SPLITS * SIZE, SPLITS, SIZE)
    if is_last:
        if HAS_BIAS:
            in_rows = n + rows < num_outputs
            acc += gl.load(bias_ptr + n + rows, mask=in_rows, other=0.0).to(gl.float32)[:, None]
            if GATED:
                up_ptr = bias_ptr + num_outputs + n
                acc_up += gl.load(up_ptr + rows, mask=in_rows, other=0.0).to(gl.float32)[:, None]
        if GATED:
            acc = _activate(acc, acc_up, GELU)
        _store_rows(acc, y_ptr, n, t, num_outputs, num_tokens, num_warps)


def ring_layouts(launch: Launch, dtype: Any) -> tuple[gl.NVMMASharedLayout, gl.NVMMASharedLayout]:
    """Shared-memory layouts of a weight tile and an x tile."""
    weight = gl.NVMMASharedLayout.get_default_for([launch.block_n, launch.block_m], dtype)
    return weight, gl.NVMMASharedLayout.get_default_for([launch.block_t, launch.block_m], dtype)


def run_stream(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    parts: torch.Tensor,
    arrivals: torch.Tensor,
    launch: Launch,
    constants: dict[str, Any],
) -> None:
    """x [T, M], weight [N, M] -> y; rows are multiples of 16 bytes. gemm_triton.py does the rest."""
    w_layout, x_layout = ring_layouts(launch, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    w_desc = TensorDescriptor.from_tensor(weight, [launch.block_n, launch.block_m], w_layout)
    x_desc = TensorDescriptor.from_tensor(x, [launch.block_t, launch.block_m], x_layout)
    num_tiles = -(-y.shape[1] // launch.block_n) * -(-y.shape[0] // launch.block_t)
    launch_kernel(
        _stream_kernel,
        (num_tiles, launch.splits),
        (w_desc, x_desc, bias, y, parts, arrivals, y.shape[0], y.shape[1], x.shape[1]),
        BLOCK_N=launch.block_n,
        BLOCK_T=launch.block_t,
        BLOCK_M=launch.block_m,
        SPLITS=launch.splits,
        STAGES=launch.num_stages,
        num_warps=launch.num_warps,
        launch_pdl=True,
        **constants,
    )
