"""All-reduce compiles for sm_90a: nothing spilled, wide loads and stores, and no wait without an end."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from shoal.kernels.comm import all_reduce_int8_triton, all_reduce_triton
from tests.support.aot import Variant

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


def _variant(kind: str, dtype: str, world_size: int, num_features: int, *, norm: str = "") -> Variant:
    block_n = 1 << (num_features - 1).bit_length()
    group, num_warps, num_registers = all_reduce_triton.launch_parameters(
        block_n, ITEMSIZE[dtype], world_size, norms_slices=bool(norm) and "two_shot" in kind
    )
    types = dict.fromkeys(("x_ptr", "residual_ptr", "out_ptr"), f"*{dtype}") | {
        "weight_ptr": f"*{norm or dtype}", "peers_ptr": "*i64", "state_ptr": "*i64", "alarm_ptr": "*i32",
        "numel": "i32/16", "eps": "fp32",
    }  # fmt: skip
    constants = {
        "NUM_FEATURES": num_features, "HAS_NORM": bool(norm), "WORLD": world_size, "GROUP": group, "BLOCK_N": block_n,
        "PDL": True,
    }  # fmt: skip
    options = {"num_warps": num_warps, "launch_pdl": True, "maxnreg": num_registers}
    return Variant(f"shoal.kernels.comm.all_reduce_triton:{kind}", types, constants, options)


VARIANTS = {
    f"{kind} {name}": _variant(kind, *arguments, norm=norm)
    for kind in ("_one_shot_kernel", "_two_shot_kernel")
    for name, arguments, norm in (
        ("of 2 ranks", ("bf16", 2, 1024), ""),
        ("of 2 ranks, large", ("bf16", 2, 2048), ""),
        ("of 2 ranks, normed", ("bf16", 2, 4096), "bf16"),
        ("of 4 ranks, normed", ("bf16", 4, 8192), "bf16"),
        ("of 4 ranks, an odd row, fp32 weight", ("fp16", 4, 2304), "fp32"),
        ("of 4 ranks", ("bf16", 4, 1024), ""),
        ("of 8 ranks", ("bf16", 8, 2048), ""),
        ("of 8 ranks, normed", ("bf16", 8, 8192), "bf16"),
        ("in fp32", ("fp32", 2, 4096), "fp32"),
    )
}


INT8_TYPES = {"peers_ptr": "*i64", "state_ptr": "*i64", "alarm_ptr": "*i32", "numel": "i32/16"}
VARIANTS |= {
    f"_all_reduce_int8_kernel of {dtype}, {world_size} ranks": Variant(
        "shoal.kernels.comm.all_reduce_int8_triton:_all_reduce_int8_kernel",
        INT8_TYPES | {"x_ptr": f"*{dtype}"},
        {"WORLD": world_size, "PDL": True},
        {
            "num_warps": all_reduce_int8_triton.NUM_WARPS,
            "launch_pdl": True,
            "maxnreg": all_reduce_int8_triton.NUM_REGISTERS,
        },
    )
    for dtype, world_size in (("bf16", 2), ("bf16", 8), ("fp32", 4))
}


@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_without_spills(name, compiled):
    assert compiled[name].spilled == 0
    assert compiled[name].registers <= VARIANTS[name].options["maxnreg"]


@pytest.mark.parametrize("name", VARIANTS)
def test_words_are_read_and_written_16_bytes_at_a_time(name, compiled):
    """The rest is the state, one number at a time, and in 8 bits the scales."""
    kernel = compiled[name]
    opcodes = {each.opcode for each in kernel.sass if each.opcode.startswith(("LDG", "STG"))}
    wide, single = {"LDG.E.128.STRONG.SYS", "LDG.E.128", "STG.E.128"}, {"LDG.E.64", "LDG.E", "STG.E.64", "STG.E"}
    scales = {"LDG.E.STRONG.SYS"} if "int8" in name else set()
    assert opcodes == wide | single | scales
    assert sum(kernel.count(opcode) for opcode in ("LDG.E.64", "STG.E.64")) <= 8


@pytest.mark.parametrize("name", VARIANTS)
def test_every_wait_counts_its_turns_to_a_limit(name, compiled):
    waits = [loop for loop in _inner_loops(compiled[name].ptx) if "ld.volatile" in loop]
    assert len(waits) == (1 if "one_shot" in name else 2 if "two_shot" in name else 4)
    for loop in waits:
        going_on = re.findall(r"@(%p\d+) bra", loop)[-1]
        both = re.search(rf"and\.pred\s+{going_on}, (%p\d+), (%p\d+);", loop)
        assert both is not None
        counts = [re.search(rf"setp\.lt\.s32\s+{predicate}, (%r\d+), (%r\d+);", loop) for predicate in both.groups()]
        turn, limit = next(found.groups() for found in counts if found is not None)
        assert re.search(rf"add\.s32\s+{turn}, {turn}, 1;", loop)
        assert not re.search(rf"\s{limit}, .*;\n", re.sub(r"setp.*", "", loop)), "the limit does not move"


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_shared_before_the_kernels_before_it_have_ended(name, compiled):
    """But for the ticket, which is drawn before the next step's programs can draw theirs."""
    ptx = compiled[name].ptx
    wait = ptx.index("griddepcontrol.wait")
    assert ptx.index("atom.global") < ptx.index("griddepcontrol.launch_dependents") < wait
    machine = [each.opcode.split(".")[0] for each in compiled[name].sass]
    assert "BAR" in machine[machine.index("ATOMG") : machine.index("PREEXIT")]  # the ticket has come by then
    assert all(wait < ptx.index(access) for access in ("st.global", "ld.volatile"))


def _inner_loops(ptx: str) -> list[str]:
    """What stands between a label and a branch back to it, no other loop being in between."""
    places = {match[1]: match.start() for match in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.M)}
    jumps = [(places[match[1]], match.end()) for match in re.finditer(r"bra(?:\.uni)?\s+(\$L__BB\d+_\d+);", ptx)]
    back = [(begin, end) for begin, end in jumps if begin < end]
    inner = [(a, b) for a, b in back if not any((a, b) != (c, d) and a <= c and d <= b for c, d in back)]
    return [ptx[begin:end] for begin, end in inner]
