"""The attention kernels compile for sm_90: no spills, tensor cores, copies to shared memory while others compute."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from shoal.kernels.attention.paged_decode_triton import decode_launch, join_chunk, padded_dim
from shoal.kernels.attention.paged_prefill_triton import prefill_launch
from tests.support.aot import Variant, thread_instructions

ELEMENT_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
SETTINGS = {"context_lens_ptr": "*i32", "block_tables_ptr": "*i32", "inner": "fp32", "unit": "fp32"}


def _shape(head_dim: int, block_size: int) -> dict[str, int | bool]:
    return {"BLOCK_SIZE": block_size, "HEAD_DIM": head_dim, "PADDED_DIM": padded_dim(head_dim)}


def _decode(dtype: str, head_dim: int, *, block_size=64, group=4, windowed=False, capped=False, split=True) -> Variant:
    types = {**SETTINGS, "parts_ptr": "*fp32", "lse_ptr": "*fp32", "arrivals_ptr": "*i32"}
    types |= dict.fromkeys(("out_ptr", "q_ptr", "cache_ptr"), f"*{dtype}")
    padded_group = 1 << (group - 1).bit_length()
    constants = {"NUM_KV_HEADS": 8, "GROUP": group, "ROWS": 16, "WINDOWED": windowed, "CAPPED": capped, "SPLIT": split}
    constants |= {"PADDED_GROUP": padded_group, "JOIN_CHUNK": join_chunk(padded_group, head_dim), "PDL": True}
    return Variant(
        "shoal.kernels.attention.paged_decode_triton:_paged_decode_kernel",
        types,
        constants | _shape(head_dim, block_size),
        decode_launch(block_size, head_dim, ELEMENT_SIZE[dtype]),
    )


def _prefill(dtype: str, head_dim: int, *, block_size=64, group=4, windowed=False, capped=False) -> Variant:
    types = {**SETTINGS, "starts_ptr": "*i32"} | dict.fromkeys(("out_ptr", "q_ptr", "cache_ptr"), f"*{dtype}")
    launch = prefill_launch(group, block_size, head_dim, ELEMENT_SIZE[dtype])
    constants = {"NUM_KV_HEADS": 8, "GROUP": group, "WINDOWED": windowed, "CAPPED": capped}
    constants |= {name: launch.pop(name) for name in ("BLOCK_ROWS", "STAGES")} | {"PDL": True}
    constants |= _shape(head_dim, block_size)
    return Variant("shoal.kernels.attention.paged_prefill_triton:_paged_prefill_kernel", types, constants, launch)


VARIANTS = {
    "decode": _decode("bf16", 128),
    "decode in one split": _decode("bf16", 128, split=False),
    "decode, window and soft cap": _decode("bf16", 128, windowed=True, capped=True),
    "decode, small heads": _decode("fp16", 64, group=7),
    "decode, odd heads": _decode("bf16", 96, group=1),
    "decode, large heads": _decode("bf16", 256, group=2, windowed=True, capped=True),
    "decode, small blocks": _decode("bf16", 128, block_size=16),
    "decode in fp32": _decode("fp32", 32, block_size=16),
    "prefill": _prefill("bf16", 128),
    "prefill, window and soft cap": _prefill("bf16", 128, windowed=True, capped=True),
    "prefill, soft cap": _prefill("bf16", 128, capped=True),
    "prefill, small heads": _prefill("fp16", 64, group=7),
    "prefill, odd heads": _prefill("bf16", 96, group=1),
    "prefill, large heads": _prefill("bf16", 256, group=2, windowed=True, capped=True),
    "prefill, small blocks": _prefill("bf16", 128, block_size=16),
    "prefill in fp32": _prefill("fp32", 32, block_size=16),
}
HALF_PRECISION = [name for name in VARIANTS if "fp32" not in name and not name.startswith("join")]


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    kernel = compiled[name]
    assert kernel.spilled == 0
    assert kernel.registers <= (255 if name.startswith("prefill") else 168)  # three decode programs on an SM


@pytest.mark.parametrize("name", HALF_PRECISION)
def test_products_run_on_tensor_cores_while_blocks_are_copied(name, compiled):
    ptx = compiled[name].ptx
    assert ("wgmma.mma_async" if name.startswith("prefill") else "mma.sync") in ptx
    assert "cp.async.cg.shared.global" in ptx  # 16 bytes each, past the registers


@pytest.mark.parametrize("name", ["decode", "decode in one split"])
def test_decode_issues_a_fifth_of_what_full_bandwidth_allows(name, compiled):
    """15.6 instructions of a lane for each bf16 element; a turn reads 64 keys and 64 values of 128."""
    assert thread_instructions(compiled[name].loops[0], 4, 2 * 64 * 128) < 15.6 / 5


@pytest.mark.parametrize("name", [name for name in HALF_PRECISION if name.startswith("prefill")])
def test_products_of_a_turn_do_not_wait_for_each_other(name, compiled):
    """Small changes to the kernel make ptxas put a wait after each wgmma of all its loops, for no stated reason."""
    turn = compiled[name].loops[-1]
    assert sum(each.opcode.startswith("HGMMA") for each in turn) >= 8
    assert sum(each.opcode.startswith("WARPGROUP") for each in turn) <= 4


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("prefill")])
def test_every_prefill_program_waits_before_it_reads_writes_or_ends(name, compiled):
    """One that ended without waiting would let the next kernel take what is still being written as complete."""
    ptx = compiled[name].ptx
    before = ptx[: ptx.index("griddepcontrol.wait")]
    assert not [each for each in ("ld.global", "st.global", "cp.async", "atom.", "red.", "ret;") if each in before]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("decode")])
def test_decode_lets_the_next_kernel_start_and_itself_starts_after_those_before(name, compiled):
    ptx = compiled[name].ptx
    assert "griddepcontrol.launch_dependents" in ptx
    assert "griddepcontrol.wait" not in ptx
