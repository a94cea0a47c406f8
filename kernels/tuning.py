"""Which kernel runs a GEMM, and its launch parameters, from host shapes alone.

`kernels/tuned/<device>.json`, written by `python -m benchmarks.tune`, maps (outputs, inputs) and a bucket
of tokens to launch parameters, or null where cuBLAS was faster. T tokens take the first bucket not smaller;
beyond the last, cuBLAS. Other shapes, and devices from Hopper on without a table, take `default_launch`;
older devices cuBLAS.

The tables are for 16-bit dtypes. fp32 takes cuBLAS: without rounding to tf32 there are no tensor cores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from .backend import Backend, backend_of

TABLES = Path(__file__).parent / "tuned"
TOKEN_BUCKETS = (1, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Launch:
    """One way to run a GEMM.

    `kernel`: "fma" (one token) or "mma" (gemm_triton.py), or "stream" (gemm_stream_triton.py, on Hopper). A
    program makes `block_n` outputs of `block_t` tokens, `block_m` inputs at a time, `num_stages` tiles
    ahead; `splits` programs share a tile's inputs. fma and mma prefetch `prefetch` inputs of each weight
    row into L2.
    """

    kernel: str
    block_n: int
    block_t: int
    block_m: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1
    prefetch: int = 0


def invariant_launch(itemsize: int, num_tokens: int, *, gated: bool) -> Launch:
    """A launch for any shape, of a family in which a row's bits do not depend on T.

    An output's inputs are summed in one order by one instruction. BLOCK_T sets only how many tokens share it;
    on an H200 no bit of a token depends on it (tests/kernels/linear/test_gemm.py).
    """
    if itemsize == 4:
        return Launch("mma", 32, 32, 32, num_warps=4, num_stages=3)  # no tensor cores: fp32 is not rounded to tf32
    if num_tokens <= 16:
        return Launch("mma", 64, 16, 64, num_warps=4, num_stages=7)
    if num_tokens <= 64:
        return Launch("mma", 64, 64, 64, num_warps=4, num_stages=5)
    if gated:
        return Launch("mma", 64, 128, 64, num_warps=4, num_stages=4)  # two sums for each output
    return Launch("mma", 128, 128, 64, num_warps=8, num_stages=4)


def launch_for(x: torch.Tensor, weight: torch.Tensor, *, gated: bool, invariant: bool) -> Launch | None:
    """The launch of x [T, M] by weight [N, M] (gated: [2N, M]); None for torch's GEMM."""
    if backend_of(x) is Backend.TORCH or x.shape[0] == 0:
        return None
    if invariant:
        return invariant_launch(x.itemsize, x.shape[0], gated=gated)
    num_outputs, num_inputs = weight.shape
    return _chosen(x.device, x.dtype, num_outputs // 2 if gated else num_outputs, num_inputs, x.shape[0], gated)


@lru_cache(maxsize=1 << 14)
def _chosen(
    device: torch.device, dtype: torch.dtype, num_outputs: int, num_inputs: int, num_tokens: int, gated: bool
) -> Launch | None:
    """Cached, as every eager GEMM calls it: 0.7 us on a CPU core, lookup included."""
    if dtype.itemsize != 2 or num_tokens > TOKEN_BUCKETS[-1] or num_inputs % 8:
        return None
    table = tuned(device)
    by_bucket = table.get(shape_key(num_outputs, num_inputs, gated))
    if by_bucket is not None:
        return next((launch for bucket, launch in by_bucket.items() if bucket >= num_tokens), None)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return None
    return default_launch(num_outputs, num_inputs, num_tokens, gated=gated)


def default_launch(num_outputs: int, num_inputs: int, num_tokens: int, *, gated: bool) -> Launch | None:
    """A sound launch for an untuned shape."""
    if num_tokens == 1:
        num_warps = 4 if num_inputs >= 1024 else 1
        return Launch("fma", 2, 1, 256 * num_warps, num_warps=num_warps)
    if num_tokens <= 16:
        return Launch("mma", 64, 16, 128, num_warps=4, num_stages=4)
    if gated and num_tokens <= 128:
        return Launch("mma", 64, 64 if num_tokens <= 64 else 128, 64, num_warps=4, num_stages=5)
    return None


def shape_key(num_outputs: int, num_inputs: int, gated: bool) -> str:
    return f"{'gated ' if gated else ''}{num_outputs}x{num_inputs}"


def table_name(device_name: str) -> str:
    """File name of a device's table, from CUDA's device name."""
    return f"{device_name.lower().replace(' ', '-')}.json"


@cache
def tuned(device: torch.device) -> dict[str, dict[int, Launch | None]]:
    """The device's table: choices by ascending bucket, by shape. Empty if none is shipped."""
    if device.type != "cuda":
        return {}
    file = TABLES / table_name(torch.cuda.get_device_name(device))
    return parse_table(json.loads(file.read_text("utf-8"))) if file.is_file() else {}


def parse_table(content: dict[str, Any]) -> dict[str, dict[int, Launch | None]]:
    """The shapes of a table file; see `format_table`."""
    return {
        shape: {int(bucket): None if each is None else Launch(**each) for bucket, each in by_bucket.items()}
        for shape, by_bucket in content["shapes"].items()
    }


def format_table(device_name: str, versions: dict[str, str], shapes: dict[str, dict[int, Launch | None]]) -> str:
    """The text of a table file, one line a choice."""
    lines = []
    for shape, by_bucket in shapes.items():
        choices = ",\n".join(
            f'      "{bucket}": {json.dumps(None if launch is None else asdict(launch))}'
            for bucket, launch in sorted(by_bucket.items())
        )
        lines.append(f'    "{shape}": {{\n{choices}\n    }}')
    head = f'{{\n  "device": {json.dumps(device_name)},\n  "versions": {json.dumps(versions)},\n  "shapes": {{\n'
    return head + ",\n".join(lines) + "\n  }\n}\n"
