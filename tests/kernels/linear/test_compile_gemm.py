"""Every launch of a matrix product that Shoal ships compiles for sm_90, without spills and within its budget."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from shoal.kernels.tuning import TABLES, Launch, default_launch, invariant_launch, parse_table
from tests.support.aot import Variant, thread_instructions

BUDGET = 15.6  # instructions of a lane for each bf16 weight at the full speed of an H200's memory
TYPES = {2: "bf16", 4: "fp32"}
OFFERED = (Launch("stream", 64, 16, 256, 2, 4, 4), Launch("stream", 128, 64, 64, 1, 8, 4))  # what the tuner may choose


def variant(launch: Launch, gated: bool, itemsize: int = 2) -> Variant:
    dtype = TYPES[itemsize]
    types = dict.fromkeys(("w_ptr", "bias_ptr", "y_ptr"), f"*{dtype}") | {"num_outputs": "i32/16"}
    constants = {
        "GATED": gated, "GELU": False, "HAS_BIAS": False, "BLOCK_N": launch.block_n, "BLOCK_M": launch.block_m,
        "PREFETCH": launch.prefetch, "PDL": True,
    }  # fmt: skip
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "launch_pdl": True}
    if launch.kernel == "fma":
        types |= {"w_ptr": "*i32", "x_ptr": "*i32", "num_words": "i32/16"}
        return Variant("shoal.kernels.linear.gemm_triton:_fma_kernel", types, constants | {"BF16": True}, options)
    types |= {
        "w_tiles": f"tensordesc<{dtype}[{launch.block_n}, {launch.block_m}]>",
        "x_tiles": f"tensordesc<{dtype}[{launch.block_t}, {launch.block_m}]>",
        "parts_ptr": "*fp32", "arrivals_ptr": "*i32", "num_inputs": "i32/16",
    }  # fmt: skip
    constants |= {"BLOCK_T": launch.block_t, "SPLITS": launch.splits}
    if launch.kernel == "stream":
        from triton.experimental.gluon import language as gl

        from shoal.kernels.linear.gemm_stream_triton import ring_layouts

        w_layout, x_layout = ring_layouts(launch, gl.bfloat16)
        types |= {
            "w_desc": f"{types.pop('w_tiles')[:-1]},{w_layout!r}>",
            "x_desc": f"{types.pop('x_tiles')[:-1]},{x_layout!r}>",
        }
        types.pop("w_ptr")
        constants |= {"STAGES": launch.num_stages, "num_warps": launch.num_warps}
        del constants["PREFETCH"], constants["PDL"]
        return Variant("shoal.kernels.linear.gemm_stream_triton:_stream_kernel", types, constants, options)
    constants |= {"TMA": True}
    return Variant("shoal.kernels.linear.gemm_triton:_mma_kernel", types, constants, options)


def shipped() -> dict[str, tuple[Launch, bool, int]]:
    """Every launch that can be chosen, by what distinguishes it."""
    found = {
        (invariant_launch(itemsize, num_tokens, gated=gated), gated, itemsize)
        for itemsize in TYPES
        for num_tokens in (1, 64, 2048)
        for gated in (False, True)
    }
    for gated in (False, True):
        for num_inputs in (2048, 4096):
            for num_tokens in (1, 16, 64, 128):
                launch = default_launch(4096, num_inputs, num_tokens, gated=gated)
                found |= {(launch, gated, 2)} if launch else set()
    found |= {(launch, gated, 2) for launch in OFFERED for gated in (False, True)}
    for path in TABLES.glob("*.json"):
        for shape, by_bucket in parse_table(json.loads(path.read_text("utf-8"))).items():
            found |= {(launch, "gated" in shape, 2) for launch in by_bucket.values() if launch}
    return {f"{launch} gated={gated} {TYPES[size]}": (launch, gated, size) for launch, gated, size in found}


SHIPPED = dict(sorted(shipped().items()))
VARIANTS = {name: variant(*each) for name, each in SHIPPED.items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_no_spills(name, compiled):
    assert compiled[name].spilled == 0


@pytest.mark.parametrize("name", [name for name, (_, _, itemsize) in SHIPPED.items() if itemsize == 2])
def test_instructions_for_each_weight(name, compiled):
    launch, gated, _ = SHIPPED[name]
    kernel = compiled[name]
    weights = launch.block_n * launch.block_m * (2 if gated else 1)
    largest = max(kernel.loops, key=len)
    assert thread_instructions(largest, launch.num_warps, weights) < BUDGET


@pytest.mark.parametrize(
    "name", [name for name, (launch, _, size) in SHIPPED.items() if launch.kernel != "fma" and size == 2]
)
def test_tiles_come_by_tma_and_go_through_tensor_cores(name, compiled):
    launch = SHIPPED[name][0]
    kernel = compiled[name]
    assert kernel.count("UTMALDG") > 0
    assert kernel.count("LDGSTS") == 0
    assert kernel.count("HGMMA" if launch.block_n >= 64 and launch.num_warps >= 4 else "HMMA") > 0


@pytest.mark.parametrize("name", [name for name, (launch, _, _) in SHIPPED.items() if launch.prefetch])
def test_weights_are_sent_for_before_the_wait(name, compiled):
    ptx = compiled[name].ptx
    assert 0 < ptx.index("cp.async.bulk.prefetch.L2") < ptx.index("griddepcontrol.wait")


@pytest.mark.parametrize("name", [name for name, (launch, _, _) in SHIPPED.items() if launch.kernel == "stream"])
def test_a_ring_is_filled_with_weights_before_the_wait(name, compiled):
    launch, gated, _ = SHIPPED[name]
    order = [each.opcode.split(".")[0] for each in compiled[name].sass]
    assert order[: order.index("ACQBULK")].count("UTMALDG") >= launch.num_stages * (2 if gated else 1)


@pytest.mark.parametrize("name", [name for name, (launch, _, _) in SHIPPED.items() if launch.kernel == "fma"])
def test_loads_of_one_token_are_16_bytes_wide_and_begin_before_the_wait(name, compiled):
    ptx = compiled[name].ptx
    assert ptx.count("ld.global.b32") == 0
    assert ptx.index("ld.global.v4.b32") < ptx.index("griddepcontrol.wait")
