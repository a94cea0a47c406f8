"""Triton kernels of gemm.py. At few tokens they are bound by reading the weight from HBM, and overlap that read.

`_fma_kernel`: one token. A program multiplies a few weight rows by x in registers: 3.3 to 4.2 instructions of
a thread per bf16 weight, within a budget of 15.6.
`_mma_kernel`: acc[BLOCK_N, BLOCK_T] = W @ X^T. The weight is the left operand, so that the 64 rows of wgmma
(16 of mma) are outputs, not padding. Tiles come by TMA where strides allow it. With SPLITS > 1 programs split
the inputs; the last to end adds the partial sums in split order, so timing does not change the result.

Weights are constant: a kernel prefetches its first tile before it waits for its predecessor (PDL).
Legend as in gemm.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops_triton import activate
from ..pdl_triton import launch_kernel, pdl_launch, release_dependents, wait_for_inputs
from ..tuning import Launch

MAX_SPLIT_TILES = 4096
MAX_STREAMS = 64  # torch has 32 per device and priority


@triton.jit
def _prefetch(w_ptr, first_row, column, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Prefetch a weight tile into L2: one asynchronous bulk copy a row.

    Thread i prefetches row i; surplus threads hold duplicates and are masked.
    """
    SIZE: tl.constexpr = COLUMNS * w_ptr.dtype.element_ty.primitive_bitwidth // 8
    if column + COLUMNS <= num_columns:
        rows = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
        tl.inline_asm_elementwise(
            """{
            .reg .pred mine; .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.lt.u32 mine, thread, $3;
            @mine cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
            }""",
            "=r,l,r,r", [w_ptr + rows * num_columns + column, SIZE, ROWS], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _low(words, BF16: tl.constexpr):
    """The first value of each 32-bit word, in fp32."""
    if BF16:
        return (words << 16).to(tl.float32, bitcast=True)
    else:
        return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _high(words, BF16: tl.constexpr):
    """The second value of each 32-bit word, in fp32."""
    if BF16:
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _dot_in_threads(w, x_low, x_high, BF16: tl.constexpr):
    """w [N, M / 2] words -> [N, M / 8]: each thread sums its 16-byte loads, to hold few sums."""
    products = _low(w, BF16) * x_low[None, :] + _high(w, BF16) * x_high[None, :]
    return tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // 4, 4)), 2)


@triton.jit
def _fma_kernel(
    w_ptr,  # 32-bit words, like x: pairs of 16-bit values, unpacked on use, not on load
    x_ptr,
    bias_ptr,
    y_ptr,
    num_outputs,
    num_words,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p computes outputs p * BLOCK_N .. of one token."""
    WORDS: tl.constexpr = BLOCK_M // 2
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, WORDS)
    in_rows = rows < num_outputs
    w_ptrs = w_ptr + tl.minimum(rows, num_outputs - 1).to(tl.int64)[:, None] * num_words + columns[None, :]
    up_ptrs = w_ptrs + tl.cast(num_outputs, tl.int64) * num_words
    w = tl.load(w_ptrs, mask=(columns < num_words)[None, :], other=0)
    if GATED:
        up = tl.load(up_ptrs, mask=(columns < num_words)[None, :], other=0)
    if PDL and PREFETCH > 0:
        num_rows = num_outputs * 2 if GATED else num_outputs
        _prefetch(w_ptr, first, WORDS, num_rows, num_words, BLOCK_N, PREFETCH // 2)
        if GATED:
            _prefetch(w_ptr, num_outputs + first, WORDS, num_rows, num_words, BLOCK_N, PREFETCH // 2)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, WORDS // 4), tl.float32)
    acc_up = tl.zeros((BLOCK_N, WORDS // 4), tl.float32)
    for start in range(0, num_words, WORDS):
        x = tl.load(x_ptr + start + columns, mask=start + columns < num_words, other=0)
        x_low, x_high = _low(x, BF16), _high(x, BF16)
        ahead = (start + WORDS + columns < num_words)[None, :]
        w_next = tl.load(w_ptrs + start + WORDS, mask=ahead, other=0)
        acc += _dot_in_threads(w, x_low, x_high, BF16)
        w = w_next
        if GATED:
            up_next = tl.load(up_ptrs + start + WORDS, mask=ahead, other=0)
            acc_up += _dot_in_threads(up, x_low, x_high, BF16)
            up = up_next
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)
    if GATED:
        y_up = tl.sum(acc_up, 1)
        if HAS_BIAS:
            y_up += tl.load(bias_ptr + num_outputs + rows, mask=in_rows, other=0.0).to(tl.float32)
        y = activate(y, y_up, GELU)
    tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=in_rows)


@triton.jit
def _load_tile(
    source,  # [num_rows, num_columns]: descriptor or pointer
    row,
    column,
    num_rows,
    num_columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """The tile at (row, column), zero where it is outside."""
    if TMA:
        return source.load([row, column])
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        return tl.load(source + rows.to(tl.int64)[:, None] * num_columns + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _is_last(arrivals_ptr, SPLITS: tl.constexpr):
    """Whether the tile's other splits have stored their sums; if so resets the counter."""
    tl.debug_barrier()  # all threads have stored before the arrival
    is_last = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        tl.store(arrivals_ptr, 0)
    return is_last


@triton.jit
def _sum_of_parts(parts, SPLITS: tl.constexpr, SIZE: tl.constexpr):
    """Sum the parts of a tile in split order."""
    acc = tl.load(parts, cache_modifier=".cg")
    for i in tl.static_range(1, SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        acc += tl.load(parts + i * SIZE, cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _mma_kernel(
    w_tiles,
    x_tiles,
    w_ptr,
    bias_ptr,
    y_ptr,
    parts_ptr,
    arrivals_ptr,
    num_tokens,
    num_outputs,
    num_inputs,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    PREFETCH: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (p, s) computes split s of output tile p, [BLOCK_N, BLOCK_T]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    num_blocks_t = tl.cdiv(num_tokens, BLOCK_T)
    n, t = tile // num_blocks_t * BLOCK_N, tile % num_blocks_t * BLOCK_T  # neighbouring programs share weights
    num_rows = num_outputs * 2 if GATED else num_outputs
    num_steps = tl.cdiv(num_inputs, BLOCK_M)
    first_step, last_step = num_steps * split // SPLITS, num_steps * (split + 1) // SPLITS
    if PDL and PREFETCH > 0:
        _prefetch(w_ptr, n, first_step * BLOCK_M, num_rows, num_inputs, BLOCK_N, PREFETCH)
        if GATED:
            _prefetch(w_ptr, num_outputs + n, first_step * BLOCK_M, num_rows, num_inputs, BLOCK_N, PREFETCH)
    release_dependents(PDL)
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for step in range(first_step, last_step):
        m = step * BLOCK_M
        w = _load_tile(w_tiles, n, m, num_rows, num_inputs, BLOCK_N, BLOCK_M, TMA)
        x = _load_tile(x_tiles, t, m, num_tokens, num_inputs, BLOCK_T, BLOCK_M, TMA)
        acc = tl.dot(w, x.T, acc, input_precision="ieee")  # no tf32 rounding of fp32
        if GATED:
            up = _load_tile(w_tiles, num_outputs + n, m, num_rows, num_inputs, BLOCK_N, BLOCK_M, TMA)
            acc_up = tl.dot(up, x.T, acc_up, input_precision="ieee")
    if SPLITS > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_T
        places = tl.arange(0, BLOCK_N)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
        parts = parts_ptr + tile.to(tl.int64) * (SPLITS * SIZE * (2 if GATED else 1)) + places
        tl.store(parts + split * SIZE, acc)
        if GATED:
            tl.store(parts + (SPLITS + split) * SIZE, acc_up)
        if not _is_last(arrivals_ptr + tile, SPLITS):
            return
        acc = _sum_of_parts(parts, SPLITS, SIZE)
        if GATED:
            acc_up = _sum_of_parts(parts + SPLITS * SIZE, SPLITS, SIZE)
    rows, tokens = n + tl.arange(0, BLOCK_N), t + tl.arange(0, BLOCK_T)
    in_rows = rows < num_outputs
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            acc_up += tl.load(bias_ptr + num_outputs + rows, mask=in_rows, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, acc_up, GELU)
    y_ptrs = y_ptr + tokens.to(tl.int64)[None, :] * num_outputs + rows[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & (tokens < num_tokens)[None, :])


class _Arrivals:
    """Counters of finished splits, one a tile, a row per stream, zero between GEMMs. Users of a row run in order."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a GEMM with split inputs must run once before one is captured, for its counters")
        self._rows = torch.zeros(MAX_STREAMS, MAX_SPLIT_TILES, dtype=torch.int32, device=device)
        self._streams: dict[int, int] = {}

    def of_current_stream(self) -> torch.Tensor:
        stream = torch.cuda.current_stream(self._rows.device).cuda_stream if self._rows.is_cuda else 0
        return self._rows[self._streams.setdefault(stream, len(self._streams))]


@cache
def _arrivals(device: torch.device) -> _Arrivals:
    return _Arrivals(device)


def gemm_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str | None, launch: Launch
) -> torch.Tensor:
    """x [T, M], weight [N, M] -> [T, N]; with an activation weight [2N, M], gate rows first.

    Raises ValueError where the weight is not contiguous, or the launch does not fit the shapes.
    """
    if not weight.is_contiguous():
        raise ValueError(f"the weight has strides {weight.stride()}; it must be contiguous")
    x = x.contiguous()
    gated = activation is not None
    y = torch.empty(x.shape[0], weight.shape[0] // (2 if gated else 1), dtype=x.dtype, device=x.device)
    constants: dict[str, Any] = {
        "GATED": gated, "GELU": gated and activation != "silu", "HAS_BIAS": bias is not None
    }  # fmt: skip
    operands = x, weight, weight if bias is None else bias, y
    if launch.kernel == "fma":
        _run_fma(*operands, launch, constants)
    elif launch.kernel == "stream":
        from .gemm_stream_triton import run_stream

        run_stream(*operands, *_split_buffers(y, launch, gated=gated), launch, constants)
    else:
        _run_mma(*operands, *_split_buffers(y, launch, gated=gated), launch, constants)
    return y


def _split_buffers(y: torch.Tensor, launch: Launch, *, gated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial sums and counters of programs that share a tile's inputs. Unused without splits."""
    if launch.splits == 1:
        return y, y
    num_tiles = -(-y.shape[1] // launch.block_n) * -(-y.shape[0] // launch.block_t)
    if num_tiles > MAX_SPLIT_TILES:
        raise ValueError(f"{num_tiles} tiles with split inputs, {MAX_SPLIT_TILES} at most; take larger tiles")
    size = num_tiles * launch.splits * launch.block_n * launch.block_t * (2 if gated else 1)
    return torch.empty(size, dtype=torch.float32, device=y.device), _arrivals(y.device).of_current_stream()


def _run_fma(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, y: torch.Tensor, launch: Launch, constants: dict
) -> None:
    if x.shape[0] != 1 or x.itemsize != 2 or x.shape[1] % 2:
        raise ValueError(f"x is {list(x.shape)} in {x.dtype}; this launch takes one token of pairs of 16-bit values")
    constants |= {"BF16": x.dtype == torch.bfloat16, "BLOCK_N": launch.block_n, "BLOCK_M": launch.block_m}
    num_programs = -(-y.shape[1] // launch.block_n)
    launch_kernel(
        _fma_kernel,
        (num_programs,),
        (weight.view(torch.int32), x.view(torch.int32), bias, y, y.shape[1], x.shape[1] // 2),
        PREFETCH=launch.prefetch,
        **constants,
        num_warps=launch.num_warps,
        **pdl_launch(x),
    )


def _run_mma(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    y: torch.Tensor,
    parts: torch.Tensor,
    arrivals: torch.Tensor,
    launch: Launch,
    constants: dict,
) -> None:
    (num_tokens, num_inputs), num_outputs = x.shape, y.shape[1]
    num_tiles = -(-num_outputs // launch.block_n) * -(-num_tokens // launch.block_t)
    tma = num_inputs * x.itemsize % 16 == 0 and (x.data_ptr() | weight.data_ptr()) % 16 == 0
    w_tiles, x_tiles = weight, x
    if tma:
        w_tiles = TensorDescriptor.from_tensor(weight, [launch.block_n, launch.block_m])
        x_tiles = TensorDescriptor.from_tensor(x, [launch.block_t, launch.block_m])
    launch_kernel(
        _mma_kernel,
        (num_tiles, launch.splits),
        (w_tiles, x_tiles, weight, bias, y, parts, arrivals, num_tokens, num_outputs, num_inputs),
        BLOCK_N=launch.block_n,
        BLOCK_T=launch.block_t,
        BLOCK_M=launch.block_m,
        SPLITS=launch.splits,
        PREFETCH=launch.prefetch if tma else 0,
        TMA=tma,
        **constants,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **pdl_launch(x),
    )
