"""Every variant of a memory-bound kernel compiles for sm_90, in few registers and with the widest loads."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from shoal.kernels import block_copy_triton, rms_norm_triton, rope_triton, silu_mul_triton
from tests.support.aot import Compiled, Variant, compile_variants


def _norm(num_features: int, dtype: str, weight: str | None = None, *, residual: bool = False, heads: bool = False):
    block_rows, block_n, num_warps = rms_norm_triton.launch_parameters(num_features)
    types = dict.fromkeys(("x_ptr", "residual_ptr", "out_ptr"), f"*{dtype}")
    types |= {"weight_ptr": f"*{weight or dtype}", "eps": "fp32", "num_features": "i32/16"}
    constants = {"HAS_RESIDUAL": residual, "BLOCK_ROWS": block_rows, "BLOCK_N": block_n}
    if not heads:
        constants["num_inner"] = 1
    return Variant("shoal.kernels.rms_norm_triton:_rms_norm_kernel", types, constants, {"num_warps": num_warps})


def _silu_mul(dtype: str, *, gelu: bool):
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "num_features": "i32/16"}
    constants = {"GELU": gelu, "BLOCK_N": silu_mul_triton.BLOCK_N}
    options = {"num_warps": silu_mul_triton.NUM_WARPS}
    return Variant("shoal.kernels.silu_mul_triton:_silu_mul_kernel", types, constants, options)


WARPS = {"num_warps": rope_triton.NUM_WARPS}


def _rope(dtype: str, num_heads: int, half: int):
    block_heads, block_half = rope_triton.launch_parameters(num_heads, half)
    constants = {"NUM_HEADS": num_heads, "HALF": half, "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half}
    types = {"x_ptr": f"*{dtype}", "cos_sin_ptr": "*fp32", "position_ptr": "*i64"}
    return Variant("shoal.kernels.rope_triton:_rope_kernel", types, constants, WARPS)


def _kv_store(dtype: str, num_kv_heads: int, head_dim: int):
    block_heads, block_dim = rope_triton.launch_parameters(2 * num_kv_heads, head_dim)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": 64, "HEAD_DIM": head_dim,
        "BLOCK_HEADS": block_heads, "BLOCK_DIM": block_dim,
    }  # fmt: skip
    types = {"kv_ptr": f"*{dtype}", "cache_ptr": f"*{dtype}", "slot_ptr": "*i64"}
    return Variant("shoal.kernels.kv_store_triton:_kv_store_kernel", types, constants, WARPS)


def _rope_kv_store(dtype: str, num_heads: int, num_kv_heads: int, head_dim: int, half: int, block_rest: int = 0):
    block_heads, block_half = rope_triton.launch_parameters(num_heads + 2 * num_kv_heads, half)
    constants = {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": 64, "HEAD_DIM": head_dim,
        "HALF": half, "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half, "BLOCK_REST": block_rest,
    }  # fmt: skip
    types = {
        "qkv_ptr": f"*{dtype}", "cos_sin_ptr": "*fp32", "position_ptr": "*i64", "cache_ptr": f"*{dtype}",
        "slot_ptr": "*i64",
    }  # fmt: skip
    return Variant("shoal.kernels.kv_store_triton:_rope_kv_store_kernel", types, constants, WARPS)


def _block_copy(dtype: str):
    types = {"cache_ptr": f"*{dtype}", "source_ptr": "*i64", "target_ptr": "*i64", "block_numel": "i32/16"}
    constants = {"MAX_COPIES": block_copy_triton.MAX_COPIES, "BLOCK_N": block_copy_triton.BLOCK_N}
    options = {"num_warps": block_copy_triton.NUM_WARPS}
    return Variant("shoal.kernels.block_copy_triton:_block_copy_kernel", types, constants, options)


VARIANTS = {
    "norm of a hidden state": _norm(4096, "bf16"),
    "norm after an addition": _norm(4096, "bf16", residual=True),
    "norm after an addition, fp32 weight": _norm(2304, "bf16", "fp32", residual=True),
    "norm of heads": _norm(128, "fp16", heads=True),
    "norm of the longest row": _norm(rms_norm_triton.MAX_FEATURES, "bf16", residual=True),
    "norm in fp32": _norm(1024, "fp32", residual=True),
    "silu": _silu_mul("bf16", gelu=False),
    "gelu": _silu_mul("fp16", gelu=True),
    "rope": _rope("bf16", 40, 64),
    "rope in fp32": _rope("fp32", 6, 16),
    "store": _kv_store("bf16", 8, 128),
    "rope and store": _rope_kv_store("bf16", 32, 8, 128, 64),
    "rope and store, part of a head": _rope_kv_store("bf16", 32, 32, 80, 16, 64),
    "block copy": _block_copy("bf16"),
    "block copy in fp32": _block_copy("fp32"),
}
MAX_REGISTERS = 64  # of 65,536: 32 warps and more to an SM, enough loads in flight to fill the memory's bandwidth


@pytest.fixture(scope="module")
def compiled() -> dict[str, Compiled]:
    return compile_variants(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    kernel = compiled[name]
    assert kernel.spilled == 0
    assert kernel.registers <= (128 if name == "norm of the longest row" else MAX_REGISTERS)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith(("norm of a hidden", "silu", "block"))])
def test_loads_are_16_bytes_wide(name, compiled):
    assert "ld.global.v4.b32" in compiled[name].ptx


@pytest.mark.parametrize("name", ["block copy", "block copy in fp32"])
def test_block_copy_waits_between_its_loads_and_its_stores(name, compiled):
    """All of a program's loads, a barrier of all its warps, all its stores."""
    ptx = compiled[name].ptx
    last_load, first_store = ptx.rindex("ld.global"), ptx.index("st.global")
    assert last_load < first_store
    assert "bar.sync" in ptx[last_load:first_store]
