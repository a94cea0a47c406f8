"""The mixture-of-experts kernels compile for sm_90: no spills, tensor cores, copies to shared memory meanwhile."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from shoal.kernels.moe.moe_one_triton import one_token_launch
from shoal.kernels.moe.moe_route_triton import route_launch, sort_launch
from shoal.kernels.moe.moe_triton import COMBINE_N, COMBINE_WARPS, moe_launch
from tests.support.aot import Variant, thread_instructions

ROUTE, MOE, ONE = (f"shoal.kernels.moe.moe_{name}triton" for name in ("route_", "", "one_"))
BUDGET = 15.6  # instructions of a lane for each 16-bit weight, at the full speed of an H200's memory
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROW_TABLES = dict.fromkeys(("order_ptr", "tiles_ptr"), "*i32")


def _variant(kernel: str, types: dict[str, str], launch: dict[str, int], **constants: int) -> Variant:
    options = {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
    constants |= {name: value for name, value in launch.items() if name not in options}
    return Variant(kernel, types, {**constants, "PDL": True}, options)


def _route(dtype: str, num_experts: int, top_k: int) -> Variant:
    types = {"logits_ptr": f"*{dtype}", "weights_ptr": f"*{dtype}", "experts_ptr": "*i64"}
    launch = route_launch(num_experts, top_k)
    return _variant(
        f"{ROUTE}:_route_experts_kernel", types, launch, NUM_EXPERTS=num_experts, TOP_K=top_k, RENORMALIZE=True
    )


def _sort(num_tokens: int, num_experts: int, *, alone: bool = False) -> Variant:
    types = {"experts_ptr": "*i64", "counts_ptr": "*i32"} | ROW_TABLES
    launch = sort_launch(num_tokens, num_experts)
    return _variant(f"{ROUTE}:_sort_experts_kernel", types, launch, TOP_K=8, ALONE=alone)


def _count(num_tokens: int, num_experts: int) -> Variant:
    types = {"experts_ptr": "*i64", "counts_ptr": "*i32"}
    return _variant(f"{ROUTE}:_count_experts_kernel", types, sort_launch(num_tokens, num_experts), TOP_K=8)


def _gate_up(dtype: str, num_tokens: int, *, gelu: bool = False, tma: bool = True, invariant: bool = False) -> Variant:
    launch = moe_launch(num_tokens, 128, 8, DTYPES[dtype], invariant=invariant)
    types = dict.fromkeys(("x_ptr", "gate_up", "hidden_ptr"), f"*{dtype}") | ROW_TABLES
    types |= {"num_inner": "i32/16", "num_features": "i32/16"}
    if tma:
        types["gate_up"] = _descriptor(dtype, launch.gate_up["BLOCK_FEATURES"], launch.gate_up)
    constants = {"TOP_K": 8, "GELU": gelu, "BLOCK_ROWS": launch.tile_rows, "TMA": tma}
    return _variant(f"{MOE}:_gate_up_experts_kernel", types, launch.gate_up, **constants)


def _down(dtype: str, num_tokens: int, *, tma: bool = True, invariant: bool = False) -> Variant:
    launch = moe_launch(num_tokens, 128, 8, DTYPES[dtype], invariant=invariant)
    types = dict.fromkeys(("hidden", "down", "scale_ptr", "parts_ptr"), f"*{dtype}") | ROW_TABLES
    types |= {"num_inner": "i32/16", "num_features": "i32/16"}
    if tma:
        types["hidden"] = _descriptor(dtype, launch.tile_rows, launch.down)
        types["down"] = _descriptor(dtype, launch.down["BLOCK_FEATURES"], launch.down)
    return _variant(f"{MOE}:_down_experts_kernel", types, launch.down, BLOCK_ROWS=launch.tile_rows, TMA=tma)


def _descriptor(dtype: str, rows: int, launch: dict[str, int]) -> str:
    return f"tensordesc<{dtype}[{rows},{launch['BLOCK_INNER']}]>"


def _combine(dtype: str) -> Variant:
    types = {"parts_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "num_features": "i32/16"}
    return _variant(
        f"{MOE}:_combine_experts_kernel", types, {"BLOCK_N": COMBINE_N, "num_warps": COMBINE_WARPS}, TOP_K=8
    )


def _gate_up_one(dtype: str) -> Variant:
    types = dict.fromkeys(("x_ptr", "gate_up_ptr", "scale_ptr"), f"*{dtype}")
    types |= {"experts_ptr": "*i64", "hidden_ptr": "*fp32", "num_inner": "i32/16", "num_features": "i32/16"}
    return _variant(f"{ONE}:_gate_up_few_experts_kernel", types, one_token_launch(4096, gated=True), GELU=False)


def _down_one(dtype: str, num_inner: int) -> Variant:
    types = {"down_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "experts_ptr": "*i64", "hidden_ptr": "*fp32"}
    types |= {"num_inner": "i32/16", "num_features": "i32/16"}
    return _variant(f"{ONE}:_down_few_experts_kernel", types, one_token_launch(num_inner, gated=False), TOP_K=8)


VARIANTS = {
    "route": _route("bf16", 128, 8),
    "route, most experts": _route("fp32", 256, 16),
    "count": _count(8192, 128),
    "sort of one token": _sort(1, 128, alone=True),
    "sort of one chunk": _sort(256, 8, alone=True),
    "sort of many chunks": _sort(1024, 8),
    "sort of many experts": _sort(8192, 256),
    "gate and up, 16 rows": _gate_up("bf16", 1),
    "gate and up, 32 rows": _gate_up("bf16", 160),
    "gate and up, 64 rows": _gate_up("fp16", 512, gelu=True),
    "gate and up, 128 rows": _gate_up("bf16", 2048),
    "gate and up, odd, 128 rows": _gate_up("bf16", 2048, tma=False),
    "gate and up, invariant, 64 rows": _gate_up("bf16", 1, invariant=True),
    "gate and up in fp32": _gate_up("fp32", 64),
    "down, 16 rows": _down("bf16", 1),
    "down, 32 rows": _down("bf16", 160),
    "down, 64 rows": _down("fp16", 512),
    "down, 128 rows": _down("bf16", 2048),
    "down, odd, 128 rows": _down("bf16", 2048, tma=False),
    "down, invariant, 64 rows": _down("bf16", 1, invariant=True),
    "down in fp32, odd": _down("fp32", 64, tma=False),
    "combine": _combine("bf16"),
    "gate and up of one token": _gate_up_one("bf16"),
    "down of one token": _down_one("bf16", 768),
    "down of one token, narrow": _down_one("bf16", 192),
}
PRODUCTS = [name for name in VARIANTS if name.endswith("rows") and "of one" not in name]


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    kernel = compiled[name]
    assert kernel.spilled == 0
    # Three programs of four warps share 65,536 registers; of the sort there are too few to share any.
    assert kernel.registers <= (255 if "128 rows" in name or name.startswith("sort") else 168)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_run_on_tensor_cores_while_weights_are_copied(name, compiled):
    ptx = compiled[name].ptx
    assert "wgmma.mma_async" in ptx
    assert ("cp.async.cg.shared.global" if "odd" in name else "cp.async.bulk.tensor") in ptx  # past the registers


@pytest.mark.parametrize("name", [name for name in VARIANTS if "of one token" in name and "sort" not in name])
def test_kernels_of_one_token_can_reach_the_speed_of_memory(name, compiled):
    variant, kernel = VARIANTS[name], compiled[name]
    assert "ld.global.v4.b32" in kernel.ptx  # 16 bytes each
    rows = variant.constants["BLOCK_FEATURES"] * (2 if name.startswith("gate") else 1)
    num_elements = rows * variant.constants["BLOCK_INNER"]
    (loop,) = kernel.loops
    assert thread_instructions(loop, variant.options["num_warps"], num_elements) <= 0.6 * BUDGET
    assert kernel.registers <= 80  # 24 warps on an SM, each with two loads of 64 bytes a thread under way


@pytest.mark.parametrize("name", VARIANTS)
def test_every_program_waits_before_it_reads_writes_or_ends(name, compiled):
    """One that ended without waiting would let the next kernel take what is still being written as complete."""
    ptx = compiled[name].ptx
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert not [each for each in ("ld.global", "st.global", "cp.async", "atom.", "red.", "ret;") if each in before]
