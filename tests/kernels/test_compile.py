"""Every variant of a memory-bound kernel compiles for sm_90a: few registers, wide loads, few enough instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from shoal.kernels.attention import block_copy_triton, kv_store_triton, rope_triton
from shoal.kernels.linear import rms_norm_triton, silu_mul_triton
from tests.support.aot import Variant, thread_instructions
from tests.support.kernel_names import kernel_names

ATTENTION, LINEAR = "shoal.kernels.attention", "shoal.kernels.linear"


def _options(num_warps: int) -> dict[str, int]:
    return {"num_warps": num_warps, "launch_pdl": True}


def _norm(num_features: int, dtype: str, weight: str | None = None, *, residual: bool = False, num_inner: int = 1):
    block_rows, block_n, num_warps = rms_norm_triton.launch_parameters(num_features, has_residual=residual)
    types = dict.fromkeys(("x_ptr", "residual_ptr", "out_ptr"), f"*{dtype}")
    types |= {"weight_ptr": f"*{weight or dtype}", "eps": "fp32"}
    constants = {
        "NUM_INNER": num_inner, "NUM_FEATURES": num_features, "HAS_RESIDUAL": residual, "BLOCK_ROWS": block_rows,
        "BLOCK_N": block_n, "PDL": True,
    }  # fmt: skip
    return Variant(f"{LINEAR}.rms_norm_triton:_rms_norm_kernel", types, constants, _options(num_warps))


def _silu_mul(dtype: str, *, gelu: bool):
    types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "num_features": "i32/16"}
    constants = {"GELU": gelu, "BLOCK_N": silu_mul_triton.BLOCK_N, "PDL": True}
    return Variant(f"{LINEAR}.silu_mul_triton:_silu_mul_kernel", types, constants, _options(silu_mul_triton.NUM_WARPS))


def _rope(dtype: str, num_heads: int, half: int):
    block_heads, block_half, num_warps = rope_triton.launch_parameters(1, num_heads, half)
    constants = {"NUM_HEADS": num_heads, "HALF": half, "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half}
    types = {"x_ptr": f"*{dtype}", "cos_sin_ptr": "*fp32", "position_ptr": "*i64"}
    return Variant(f"{ATTENTION}.rope_triton:_rope_kernel", types, constants | {"PDL": True}, _options(num_warps))


def _kv_store(dtype: str, num_kv_heads: int, head_dim: int):
    block_heads, block_dim, num_warps = rope_triton.launch_parameters(1, 2 * num_kv_heads, head_dim)
    constants = {
        "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": 64, "HEAD_DIM": head_dim,
        "BLOCK_HEADS": block_heads, "BLOCK_DIM": block_dim, "PDL": True,
    }  # fmt: skip
    types = {"kv_ptr": f"*{dtype}", "cache_ptr": f"*{dtype}", "slot_ptr": "*i64"}
    return Variant(f"{ATTENTION}.kv_store_triton:_kv_store_kernel", types, constants, _options(num_warps))


def _rope_kv_store(
    dtype: str, num_heads: int, num_kv_heads: int, head_dim: int, half: int, *, norm: str = "", num_tokens: int = 1
):
    num_rows = num_heads + 2 * num_kv_heads
    block_heads, block_half, block_rest, num_warps = kv_store_triton.rope_launch_parameters(
        num_tokens, num_rows, half, head_dim - 2 * half
    )
    constants = {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "BLOCK_SIZE": 64, "HEAD_DIM": head_dim, "HALF": half,
        "NORM": bool(norm), "BLOCK_HEADS": block_heads, "BLOCK_HALF": block_half, "BLOCK_REST": block_rest, "PDL": True,
    }  # fmt: skip
    types = {
        "qkv_ptr": f"*{dtype}", "cos_sin_ptr": "*fp32", "position_ptr": "*i64", "cache_ptr": f"*{dtype}",
        "slot_ptr": "*i64", "eps": "fp32", "q_norm_ptr": f"*{norm or dtype}", "k_norm_ptr": f"*{norm or dtype}",
    }  # fmt: skip
    return Variant(f"{ATTENTION}.kv_store_triton:_rope_kv_store_kernel", types, constants, _options(num_warps))


def _block_copy(dtype: str):
    types = {"cache_ptr": f"*{dtype}", "source_ptr": "*i64", "target_ptr": "*i64", "block_numel": "i32/16"}
    constants = {"MAX_COPIES": block_copy_triton.MAX_COPIES, "BLOCK_N": block_copy_triton.BLOCK_N, "PDL": True}
    return Variant(
        f"{ATTENTION}.block_copy_triton:_block_copy_kernel",
        types,
        constants,
        _options(block_copy_triton.NUM_WARPS),
    )


VARIANTS = {
    "norm of a hidden state": _norm(4096, "bf16"),
    "norm after an addition": _norm(4096, "bf16", residual=True),
    "norm after an addition, fp32 weight": _norm(2304, "bf16", "fp32", residual=True),
    "norm of heads": _norm(128, "fp16", num_inner=40),
    "norm of the longest row": _norm(rms_norm_triton.MAX_FEATURES, "bf16", residual=True),
    "norm in fp32": _norm(1024, "fp32", residual=True),
    "silu": _silu_mul("bf16", gelu=False),
    "gelu": _silu_mul("fp16", gelu=True),
    "rope": _rope("bf16", 40, 64),
    "rope in fp32": _rope("fp32", 6, 16),
    "store": _kv_store("bf16", 8, 128),
    "rope and store": _rope_kv_store("bf16", 32, 8, 128, 64),
    "rope and store, part of a head": _rope_kv_store("bf16", 32, 32, 80, 16),
    "rope and store, many tokens": _rope_kv_store("bf16", 32, 8, 128, 64, num_tokens=2048),
    "norm, rope and store": _rope_kv_store("bf16", 32, 8, 128, 64, norm="bf16"),
    "norm, rope and store, fp32 weight": _rope_kv_store("bf16", 8, 4, 256, 128, norm="fp32"),
    "norm, rope and store, part of a head": _rope_kv_store("bf16", 32, 32, 80, 16, norm="bf16"),
    "block copy": _block_copy("bf16"),
    "block copy in fp32": _block_copy("fp32"),
}
MAX_REGISTERS = 64  # of 65,536: 32 warps and more to an SM, enough loads in flight to fill the memory's bandwidth
MORE_REGISTERS = {"norm of the longest row": 128, "norm, rope and store, part of a head": 80}
# Elements that a program reads and writes.
MOVED = {
    "norm of a hidden state": 2 * 4096,
    "norm after an addition": 4 * 4096,
    "norm of heads": 2 * 1024,
    "norm of the longest row": 4 * rms_norm_triton.MAX_FEATURES,
    "silu": 3 * silu_mul_triton.BLOCK_N,
    "gelu": 3 * silu_mul_triton.BLOCK_N,
    "rope": 4 * rope_triton.TILE,
    "store": 2 * rope_triton.TILE,
    "rope and store": 4 * rope_triton.TILE,
    "rope and store, many tokens": 8 * rope_triton.TILE,
    "norm, rope and store": 4 * rope_triton.TILE,
    "block copy": 2 * block_copy_triton.MAX_COPIES * block_copy_triton.BLOCK_N,
}
BUDGET = 15.6  # instructions of a lane for an element of 2 bytes, at the full speed of an H200's memory


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    kernel = compiled[name]
    assert kernel.spilled == 0
    assert kernel.registers <= MORE_REGISTERS.get(name, MAX_REGISTERS)


@pytest.mark.parametrize("name", MOVED)
def test_loads_and_stores_are_16_bytes_wide(name, compiled):
    assert compiled[name].count("LDG.E.128")
    assert compiled[name].count("STG") == compiled[name].count("STG.E.128")


@pytest.mark.parametrize("name", MOVED)
def test_instructions_are_within_the_budget(name, compiled):
    kernel = compiled[name]
    assert not kernel.loops
    assert thread_instructions(kernel.sass, VARIANTS[name].options["num_warps"], MOVED[name]) <= BUDGET


@pytest.mark.parametrize("name", VARIANTS)
def test_waits_for_the_kernels_before_it_and_lets_the_next_one_start(name, compiled):
    """Nothing is stored, and nothing but constants loaded, before the wait; the release comes first of all."""
    kernel = compiled[name]
    order = [
        each.opcode.split(".")[0]
        for each in kernel.sass
        if each.opcode.startswith(("ACQBULK", "PREEXIT", "STG", "LDG"))
    ]
    assert order[0] == "PREEXIT"
    before = order[: order.index("ACQBULK")]
    assert "STG" not in before
    assert "norm" in name or "LDG" not in before


@pytest.mark.parametrize("name", ["block copy", "block copy in fp32"])
def test_block_copy_waits_between_its_loads_and_its_stores(name, compiled):
    """All of a program's loads, a barrier of all its warps, all its stores."""
    ptx = compiled[name].ptx
    last_load, first_store = ptx.rindex("ld.global"), ptx.index("st.global")
    assert last_load < first_store
    assert "bar.sync" in ptx[last_load:first_store]


def test_every_kernel_of_the_project_is_compiled_by_a_test():
    tests = "".join(file.read_text() for file in Path(__file__).parent.rglob("test_compile*.py"))
    assert not {name for name in kernel_names() if name not in tests}
