"""Every Triton kernel once, on small odd shapes, for compute-sanitizer to watch.

    make sanitize-gpu

Torch keeps no memory of its own then (PYTORCH_NO_CUDA_MEMORY_CACHING=1): a tensor is an allocation of its size, and the
first byte behind it is unowned. The bodies are those of the tests, so results are compared too. Exits with 1 where
one is wrong, or where a kernel of kernels/ was never launched.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from shoal.kernels.comm.exchange import Algorithm
from tests.kernels.attention import test_kv_store, test_paged_attention_triton
from tests.kernels.comm import test_all_reduce
from tests.kernels.linear import test_embedding, test_gemm, test_norm_rope_act
from tests.kernels.moe import test_moe
from tests.kernels.sampling import test_penalties, test_sample_rows, test_sample_slice, test_score
from tests.kernels.step import test_step_inputs
from tests.support.kernel_names import kernel_names

BF16 = {"dtype": torch.bfloat16}
Case = tuple[Callable[..., None], dict[str, Any]]


def elementwise() -> Iterator[Case]:
    tests = test_norm_rope_act
    yield tests.test_rms_norm, {"shape": (7, 129), **BF16}
    yield tests.test_add_rms_norm_adds_in_place, {"shape": (3, 2049), **BF16}
    yield tests.test_rms_norm_of_a_view_with_an_fp32_weight_keeps_the_dtype, BF16
    yield tests.test_silu_mul, {"shape": (2, 2 * 1025), "activation": "silu", **BF16}
    yield tests.test_rope_rotates_part_of_each_head_of_a_view, {"num_rotated": 6, "head_dim": 9, "num_heads": 3, **BF16}
    tests = test_kv_store
    yield tests.test_kv_store, {"kv_heads": 3, "block_size": 8, "head_dim": 6, **BF16}
    for normed in (False, True):
        shape = {"heads": 7, "kv_heads": 3, "num_rotated": 6, "head_dim": 13}
        yield tests.test_rope_and_store_in_one, {**shape, "normed": normed, **BF16}
        yield tests.test_padding_is_not_stored, {"normed": normed}
    yield tests.test_block_copy_reads_every_source_before_it_writes, {"shape": (2, 3, 151), "name": "a chain", **BF16}


def attention() -> Iterator[Case]:
    tests = test_paged_attention_triton
    yield tests.test_decode_of_contexts_around_a_block_by_windows_caps_and_splits, {
        "window": 40, "softcap": 3.0, "splits": (3, 1),
    }  # fmt: skip
    yield tests.test_decode_in_half_precision, BF16
    yield tests.test_decode_of_a_padding_sequence_writes_nothing, {}
    yield tests.test_prefill_by_head_dim_and_block_size, {"head_dim": 20, "block_size": 16}
    yield tests.test_prefill_in_half_precision_over_several_tiles, BF16


def products() -> Iterator[Case]:
    tests = test_gemm
    launches = {
        (1, 10, 264): tests.FMA, (18, 20, 104): tests.SPLIT, (33, 16, 31): tests.MMA,
        (5, 70, 136): tests.STREAM, (40, 130, 264): tests.STREAM_SPLIT,
    }  # fmt: skip
    for shape, launch in launches.items():
        for gated in (False, True):
            yield tests.test_every_way_to_launch, {"launch": launch, "shape": shape, "gated": gated, **BF16}


def experts() -> Iterator[Case]:
    tests = test_moe
    shape = {"num_tokens": 9, "num_experts": 5, "top_k": 3}
    yield tests.test_route_takes_the_largest_probabilities, {**shape, "renormalize": True, **BF16}
    features = {"num_hidden": 40, "num_inner": 24, "activation": "silu"}
    yield tests.test_moe_mlp, {**shape, **features, **BF16}
    yield tests.test_moe_mlp, {**shape, **features, "num_tokens": 1, **BF16}
    yield tests.test_moe_mlp, {**shape, **features, **BF16, "num_tokens": 1}
    yield tests.test_moe_mlp, {**features, "num_tokens": 600, "num_experts": 100, "top_k": 3, **BF16}  # many chunks
    yield tests.test_padding_of_nan_changes_no_other_token, BF16


def sampling() -> Iterator[Case]:
    tests = test_sample_rows
    yield tests.test_tokens_are_those_of_the_naive_loop, {"vocab_size": 1001, **BF16}
    yield tests.test_a_vocabulary_of_several_chunks, {"num_rows": 13, **BF16}
    yield test_penalties.test_penalties_equal_the_loop, {}
    yield test_penalties.test_counting_goes_on_where_the_history_began, {}
    yield test_sample_slice.test_slices_choose_as_the_whole, {"vocab_size": 1001, "width": 256, "num_rows": 12, **BF16}
    yield test_score.test_scores_equal_log_softmax, {"vocab_size": 9001, "num_top": 5, **BF16}
    yield test_score.test_slices_add_up_to_the_whole, {"num_top": 3, **BF16}
    yield test_embedding.test_ranks_add_up_to_the_whole_table, {"num_features": 1500, **BF16}


def sums_over_ranks() -> Iterator[Case]:
    tests = test_all_reduce
    for algorithm in Algorithm:
        yield tests.test_sums_have_the_bits_of_the_formula, {"world_size": 4, "algorithm": algorithm, **BF16}
        yield tests.test_sums_are_added_to_the_residual_and_normed, {"world_size": 2, "algorithm": algorithm, **BF16}
    yield tests.test_sums_in_8_bits_are_those_of_the_formula, {}


def step_inputs() -> Iterator[Case]:
    tests = test_step_inputs
    yield tests.test_inputs_follow_from_the_packed_plan, {"plan": tests.MIXED, "room": (160, 8, 6, 8)}
    yield tests.test_padding_is_what_the_kernels_expect, {}
    yield tests.test_tokens_are_kept_for_the_next_step_and_for_the_host, {}


FAMILIES = (elementwise, attention, products, experts, sampling, sums_over_ranks, step_inputs)


def main() -> int:
    from triton import knobs

    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        print("sanitize: set PYTORCH_NO_CUDA_MEMORY_CACHING=1; torch's own blocks hide what lies behind a tensor")
        return 2
    launched: set[str] = set()
    knobs.runtime.launch_enter_hook.add(lambda metadata: launched.add(metadata.get()["name"]))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    failures = 0
    for body, arguments in (case for family in FAMILIES for case in family()):
        torch.manual_seed(0)
        try:
            body(**arguments, device=torch.device("cuda"))
            torch.cuda.synchronize()
        except (Exception, pytest.skip.Exception):  # what is skipped here is not watched
            failures += 1
            print(f"sanitize: {body.__name__} {arguments}", traceback.format_exc(), sep="\n")
    never = sorted(kernel_names() - launched)
    if never:
        print(f"sanitize: never launched: {', '.join(never)}")
    print(f"sanitize: {len(launched)} kernels, {failures} wrong results")
    return 1 if failures or never else 0


if __name__ == "__main__":
    sys.exit(main())
