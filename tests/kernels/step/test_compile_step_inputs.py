"""The kernels that make a step's inputs compile for sm_90a; they begin every step, so they must be light."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.support.aot import Variant

MODULE = "shoal.kernels.step.step_inputs_triton"
LONGS = dict.fromkeys(
    ("input_ids_ptr", "positions_ptr", "slots_ptr", "last_tokens_ptr", "sample_indices_ptr", "sample_rows_ptr",
     "sample_positions_ptr"), "*i64",
)  # fmt: skip
INTS = dict.fromkeys(
    ("packed_ptr", "block_tables_ptr", "decode_lens_ptr", "decode_tables_ptr", "prefill_starts_ptr",
     "prefill_lens_ptr", "prefill_tables_ptr"), "*i32",
)  # fmt: skip
VARIANTS = {
    "apply": Variant(
        f"{MODULE}:_apply_plan_kernel",
        {
            "packed_ptr": "*i32", "block_tables_ptr": "*i32", "temperature_ptr": "*fp32",
            "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "min_p_ptr": "*fp32", "seed_ptr": "*i64",
        },
        {"BLOCK": 1024, "PDL": True},
        {"num_warps": 8},
    ),
    "expand": Variant(
        f"{MODULE}:_expand_plan_kernel", LONGS | INTS, {"BLOCK_SIZE": 64, "TOKENS": 128, "COLUMNS": 256, "PDL": True}
    ),
    "keep": Variant(
        f"{MODULE}:_store_tokens_kernel",
        {"tokens_ptr": "*i64", "rows_ptr": "*i64", "packed_ptr": "*i32", "last_tokens_ptr": "*i64", "ring_ptr": "*i64"},
        {"BLOCK": 256, "PDL": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    assert compiled[name].spilled == 0
    assert compiled[name].registers <= 64


@pytest.mark.parametrize("name", VARIANTS)
def test_waits_before_it_reads_anything(name, compiled):
    ptx = compiled[name].ptx
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
