"""Step inputs made on the device equal those that a loop over the packed plan gives."""

import numpy as np
import pytest
import torch

from shoal.kernels.sampling.params import SamplingRows
from shoal.kernels.step.step_inputs import RowState, StepTensors, expand_plan_ref, load_plan, store_tokens
from shoal.replicas.plan import DEVICE_TOKEN, RowStart, StepPlan
from shoal.replicas.protocol import SamplingParams
from shoal.replicas.worker.device_inputs import pack_plan, packed_size

NUM_ROWS, NUM_COLUMNS, BLOCK_SIZE = 9, 7, 16


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def make_state(device: torch.device) -> RowState:
    generator = torch.Generator().manual_seed(3)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(1, 90, shape, generator=generator, dtype=torch.int32).to(device)

    numbers = [torch.rand(NUM_ROWS, generator=generator).to(device) for _ in range(3)]
    sampling = SamplingRows(numbers[0], integers(NUM_ROWS), numbers[1], numbers[2], integers(NUM_ROWS).long())
    return RowState(integers(NUM_ROWS, NUM_COLUMNS), integers(NUM_ROWS).long(), sampling)


def pack(plan: StepPlan, turn: int) -> torch.Tensor:
    packed = torch.zeros(packed_size(NUM_ROWS, NUM_COLUMNS, 64), dtype=torch.int32)
    return packed[: pack_plan(plan, turn, packed.numpy())]


def make_tensors(tokens: int, decodes: int, prefills: int, samples: int, device: torch.device) -> StepTensors:
    """Poisoned with a number that nothing should show."""

    def poison(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, -777, dtype=dtype, device=device)

    long = torch.int64
    return StepTensors(
        poison(tokens, dtype=long), poison(tokens, dtype=long), poison(tokens, dtype=long),
        poison(decodes), poison(decodes, NUM_COLUMNS),
        poison(prefills + 1), poison(prefills), poison(prefills, NUM_COLUMNS),
        poison(samples, dtype=long), poison(samples, dtype=long), poison(samples, dtype=long),
    )  # fmt: skip


SAMPLING = SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05)
MIXED = StepPlan(
    step=4,
    rows=ints(3, 0, 5, 2, 7),
    starts=ints(17, 40, 0, 16, 30),
    num_tokens=ints(1, 1, 1, 35, 5),
    token_ids=np.concatenate([ints(DEVICE_TOKEN, 6, DEVICE_TOKEN), np.arange(35, dtype=np.int32), ints(1, 2, 3, 4, 5)]),
    sample_slices=ints(0, 1, 2, 4, 4),
    sample_rows=ints(3, 0, 5, 7, 6),
    table_rows=ints(2, 2, 2, 2, 6, 6, 6),
    table_indices=ints(0, 1, 2, 3, 0, 1, 2),
    table_blocks=ints(80, 81, 82, 83, 70, 71, 72),
    row_starts=(RowStart(2, 2**63 + 5, 51, SAMPLING), RowStart(6, 7, 35, SamplingParams(temperature=0.0))),
)
DECODE = StepPlan(
    step=5, rows=ints(4, 1), starts=ints(31, 32), num_tokens=ints(1, 1), token_ids=ints(DEVICE_TOKEN, DEVICE_TOKEN),
    sample_slices=ints(0, 1), sample_rows=ints(4, 1),
)  # fmt: skip
EMPTY = StepPlan(6, ints(), ints(), ints(), ints(), ints(), ints())


@pytest.mark.parametrize(
    ("plan", "room"),
    [
        (MIXED, (43, 3, 2, 5)),  # just what it needs
        (MIXED, (160, 8, 6, 8)),
        (DECODE, (2, 2, 0, 2)),
        (DECODE, (8, 8, 0, 8)),
        (EMPTY, (4, 4, 2, 4)),
    ],
    ids=["mixed", "mixed with padding", "decode", "decode with padding", "empty"],
)
def test_inputs_follow_from_the_packed_plan(plan, room, device):
    packed = pack(plan, turn=1)
    state, out = make_state(device), make_tensors(*room, device)
    load_plan(packed.to(device), state, BLOCK_SIZE, out)

    expected_state, expected = make_state(torch.device("cpu")), make_tensors(*room, torch.device("cpu"))
    expected_state.block_tables[plan.table_rows, plan.table_indices] = torch.from_numpy(plan.table_blocks)
    for start in plan.row_starts:
        params, row = start.sampling, start.row
        expected_state.sampling.temperature[row] = params.temperature
        expected_state.sampling.top_k[row] = params.top_k
        expected_state.sampling.top_p[row] = params.top_p
        expected_state.sampling.min_p[row] = params.min_p
        expected_state.sampling.seed[row] = int(np.uint64(start.seed).astype(np.int64))
    torch.testing.assert_close(state.block_tables.cpu(), expected_state.block_tables)
    for got, wanted in zip(state.sampling, expected_state.sampling, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0)
    expand_plan_ref(packed, expected_state, BLOCK_SIZE, expected)
    for name, got, wanted in zip(StepTensors._fields, out, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_padding_is_what_the_kernels_expect(device):
    out = make_tensors(6, 4, 3, 5, device)
    load_plan(pack(DECODE, turn=0).to(device), make_state(device), BLOCK_SIZE, out)
    assert out.slot_mapping[2:].tolist() == [-1] * 4
    assert out.decode_lens.tolist() == [32, 33, 0, 0]
    assert out.prefill_starts.tolist() == [2] * 4
    assert out.prefill_lens.tolist() == [0] * 3
    assert out.sample_rows.tolist() == [4, 1] + [NUM_ROWS - 1] * 3
    assert out.sample_positions[:2].tolist() == [32, 33]


def test_tokens_are_kept_for_the_next_step_and_for_the_host(device):
    last = torch.full((NUM_ROWS,), 50, dtype=torch.int64, device=device)
    ring = torch.full((2, 5), -9, dtype=torch.int64, pin_memory=device.type == "cuda")  # the host's own memory
    tokens = torch.tensor([11, -1, 13], device=device)
    rows = torch.tensor([4, 1, NUM_ROWS - 1], device=device)
    store_tokens(tokens, rows, pack(DECODE, turn=1).to(device), last, ring)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert ring.tolist() == [[-9] * 5, [11, -1, 13, -9, -9]]
    assert last.tolist()[:8] == [50, 0, 50, 50, 11, 50, 50, 50], "a failed sample leaves a token that can be looked up"


def test_a_block_size_that_is_no_power_of_two_is_refused(device):
    with pytest.raises(ValueError, match="block_size 24"):
        load_plan(pack(EMPTY, turn=0).to(device), make_state(device), 24, make_tensors(1, 1, 0, 1, device))
