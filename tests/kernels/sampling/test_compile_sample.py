"""Sampling, scores, penalties and embedding compile for sm_90: few registers, no spills, wide loads, cheap noise."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from shoal.kernels.linear import embedding_triton
from shoal.kernels.sampling import (
    penalties_triton,
    sample_limits_triton,
    sample_slice_triton,
    sample_triton,
    score_triton,
)
from tests.support.aot import Variant, thread_instructions

ROWS = {
    "rows_ptr": "*i64", "temperature_ptr": "*fp32", "top_k_ptr": "*i32", "top_p_ptr": "*fp32", "score_ptr": "*fp32",
    "token_ptr": "*i32", "vocab_size": "i32/16",
}  # fmt: skip
SUMS = {"count_ptr": "*fp32", "mass_ptr": "*fp32"}
PARTS, CHUNKS = 128, 32  # of a vocabulary of 128,256
SIZES = {"PARTS": PARTS, "CHUNKS": CHUNKS, "CHUNK": sample_limits_triton.CHUNK, "PDL": True}

PACKAGE = "shoal.kernels.sampling"


def _choose(dtype: str, chunk: int, *, filtered: bool):
    types = ROWS | {"logits_ptr": f"*{dtype}", "positions_ptr": "*i64", "min_p_ptr": "*fp32", "seed_ptr": "*i64"}
    constants = {"FILTERED": filtered, "CHUNK": chunk, "PDL": True}
    options = {"num_warps": sample_triton.NUM_WARPS}
    return Variant(
        f"{PACKAGE}.sample_triton:_sample_choose_kernel",
        types | {"limits_ptr": "*fp32"},
        constants,
        options,
    )


def _profile(dtype: str, *, second: bool):
    types = ROWS | SUMS | {"logits_ptr": f"*{dtype}", "min_p_ptr": "*fp32"}
    constants = SIZES | {"SECOND": second, "FEW": sample_limits_triton.CAPACITY, "TURN": sample_limits_triton.TURN}
    options = {"num_warps": sample_limits_triton.PROFILE_WARPS}
    return Variant(f"{PACKAGE}.sample_bracket_triton:sample_profile_kernel", types, constants, options)


def _gather(dtype: str):
    types = ROWS | SUMS | {"logits_ptr": f"*{dtype}", "found_ptr": f"*{dtype}", "length_ptr": "*i32"}
    types |= {"min_p_ptr": "*fp32"}
    constants = SIZES | {"CAPACITY": sample_limits_triton.CAPACITY}
    options = {"num_warps": sample_limits_triton.GATHER_WARPS}
    return Variant(f"{PACKAGE}.sample_bracket_triton:sample_gather_kernel", types, constants, options)


def _limits(dtype: str):
    types = ROWS | SUMS | {"logits_ptr": f"*{dtype}", "found_ptr": f"*{dtype}", "length_ptr": "*i32"}
    types |= {"min_p_ptr": "*fp32", "limits_ptr": "*fp32"}
    shift = {"bf16": 16, "fp16": 13, "fp32": 0}[dtype]
    constants = {"CAPACITY": sample_limits_triton.CAPACITY, "WIDTH": sample_limits_triton.SEARCH_WIDTH, "SHIFT": shift}
    options = {"num_warps": sample_limits_triton.LIMITS_WARPS}
    return Variant(f"{PACKAGE}.sample_limits_triton:_sample_limits_kernel", types, SIZES | constants, options)


def _join():
    types = {"rows_ptr": "*i64", "score_ptr": "*fp32", "token_ptr": "*i32", "out_ptr": "*i64"}
    return Variant(
        f"{PACKAGE}.sample_triton:_sample_join_kernel",
        types,
        {"PARTS": PARTS, "PDL": True},
        {"num_warps": 1},
    )


def _slice_choose(dtype: str, chunk: int):
    types = {"logits_ptr": f"*{dtype}", "temperature_ptr": "*fp32", "score_ptr": "*fp32", "token_ptr": "*i32"}
    types |= dict.fromkeys(("rows_ptr", "positions_ptr", "seed_ptr"), "*i64")
    types |= {"slice_size": "i32/16", "first_token": "i32/16"}
    options = {"num_warps": sample_triton.NUM_WARPS}
    return Variant(f"{PACKAGE}.sample_slice_triton:_slice_choose_kernel", types, {"CHUNK": chunk, "PDL": True}, options)


def _slice_join():
    types = {"rows_ptr": "*i64", "score_ptr": "*fp32", "token_ptr": "*i32", "key_ptr": "*i64", "first_token": "i32/16"}
    return Variant(
        f"{PACKAGE}.sample_slice_triton:_slice_join_kernel",
        types,
        {"PARTS": PARTS, "PDL": True},
        {"num_warps": 1},
    )


def _winners():
    constants = {"BLOCK": sample_slice_triton.WINNERS_BLOCK, "PDL": True}
    types = {"key_ptr": "*i64", "out_ptr": "*i64"}
    return Variant(f"{PACKAGE}.sample_slice_triton:_winners_kernel", types, constants, {"num_warps": 4})


PARTIALS = {"highest_ptr": "*fp32", "mass_ptr": "*fp32", "above_ptr": "*i32"}


def _score(dtype: str, *, sliced: bool = False):
    types = PARTIALS | {"logits_ptr": f"*{dtype}", "vocab_size": "i32/16", "chosen_ptr": "*fp32" if sliced else "*i64"}
    constants = {"CHUNK": score_triton.CHUNK, "SLICE": sliced, "PDL": True}
    options = {"num_warps": score_triton.NUM_WARPS}
    return Variant(f"{PACKAGE}.score_triton:_score_chunks_kernel", types, constants, options)


def _score_join(dtype: str, *, sliced: bool = False):
    types = PARTIALS | {"logits_ptr": f"*{dtype}", "logprob_ptr": "*fp32", "total_ptr": "*fp32", "rank_ptr": "*i64"}
    types |= {"chosen_ptr": "*fp32" if sliced else "*i64"}
    constants = {"CHUNKS": CHUNKS, "SLICE": sliced, "PDL": True}
    return Variant(f"{PACKAGE}.score_triton:_score_join_kernel", types, constants, {"num_warps": 1})


def _penalties():
    types = dict.fromkeys(("logits_ptr", "repetition_ptr", "frequency_ptr", "presence_ptr"), "*fp32")
    types |= {"slots_ptr": "*i64", "history_ptr": "*i32", "vocab_size": "i32/16"}
    constants = {"BLOCK_V": penalties_triton.BLOCK_V, "PDL": True}
    options = {"num_warps": penalties_triton.NUM_WARPS, "enable_fp_fusion": False}
    return Variant(f"{PACKAGE}.penalties_triton:_apply_penalties_kernel", types, constants, options)


def _count_tokens():
    types = {"history_ptr": "*i32", "slots_ptr": "*i64", "token_ptr": "*i64"}
    constants = {"BLOCK_K": penalties_triton.BLOCK_K, "PDL": True}
    return Variant(f"{PACKAGE}.penalties_triton:_count_tokens_kernel", types, constants, {"num_warps": 4})


def _embed(dtype: str):
    types = {"ids_ptr": "*i64", "weight_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "scale": "fp32"}
    constants = {"BLOCK_H": embedding_triton.BLOCK_H, "PDL": True}
    options = {"num_warps": embedding_triton.NUM_WARPS}
    return Variant(
        "shoal.kernels.linear.embedding_triton:_embed_kernel", types | {"num_features": "i32/16"}, constants, options
    )


VARIANTS = {
    "choose": _choose("bf16", sample_triton.LARGE_CHUNK, filtered=False),
    "choose for few rows": _choose("bf16", sample_triton.SMALL_CHUNK, filtered=False),
    "choose inside limits": _choose("bf16", sample_triton.LARGE_CHUNK, filtered=True),
    "choose in fp32": _choose("fp32", sample_triton.LARGE_CHUNK, filtered=False),
    "profile": _profile("bf16", second=False),
    "profile again": _profile("bf16", second=True),
    "profile in fp32": _profile("fp32", second=True),
    "gather": _gather("bf16"),
    "gather in fp32": _gather("fp32"),
    "limits": _limits("bf16"),
    "limits in fp16": _limits("fp16"),
    "limits in fp32": _limits("fp32"),
    "join": _join(),
    "choose in a slice": _slice_choose("bf16", sample_triton.LARGE_CHUNK),
    "choose in a slice in fp32": _slice_choose("fp32", sample_triton.SMALL_CHUNK),
    "slice join": _slice_join(),
    "winners": _winners(),
    "score": _score("bf16"),
    "score in fp32": _score("fp32"),
    "score join": _score_join("bf16"),
    "score of a slice": _score("bf16", sliced=True),
    "score join of a slice": _score_join("bf16", sliced=True),
    "penalties": _penalties(),
    "count tokens": _count_tokens(),
    "embedding": _embed("bf16"),
    "embedding in fp32": _embed("fp32"),
}
WIDE = (
    "choose",
    "choose inside limits",
    "choose in fp32",
    "choose in a slice",
    "gather",
    "score",
    "penalties",
    "embedding",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    kernel = compiled[name]
    assert kernel.spilled == 0
    assert kernel.registers <= (128 if name.startswith(("profile", "gather", "limits")) else 64)


@pytest.mark.parametrize("name", WIDE)
def test_loads_are_16_bytes_wide(name, compiled):
    assert "ld.global.v4.b32" in compiled[name].ptx


@pytest.mark.parametrize("name", ["choose inside limits", "choose in fp32", "choose in a slice"])
def test_noise_takes_at_most_110_instructions_a_token(name, compiled):
    """Philox shared by four tokens, and two logarithms that are right to the last bit; no division by temperature."""
    body = max(compiled[name].loops, key=len)
    assert thread_instructions(body, sample_triton.NUM_WARPS, sample_triton.LARGE_CHUNK) <= 110


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_read_before_earlier_kernels_have_written(name, compiled):
    ptx = compiled[name].ptx
    assert "griddepcontrol.wait" in ptx
    assert "ld.global" not in ptx[: ptx.index("griddepcontrol.wait")]


def test_penalties_are_rounded_one_by_one(compiled):
    """Each product is rounded before it is subtracted, as on the CPU: 24 products, 16 differences, 8 tokens."""
    kernel = compiled["penalties"]
    assert "fma" not in kernel.ptx
    assert kernel.count("FMUL") >= 16
