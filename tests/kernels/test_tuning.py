"""How a matrix product's launch is chosen: from the shipped table, from the rule for other shapes, or cuBLAS."""

from __future__ import annotations

import json

import pytest
import torch

from shoal.kernels import tuning
from shoal.kernels.backend import Backend, use_backend
from shoal.kernels.tuning import TABLES, TOKEN_BUCKETS, Launch, default_launch, format_table, launch_for, parse_table

FMA = Launch("fma", 4, 1, 256)
MMA = Launch("mma", 64, 16, 64, splits=2, num_stages=4)
DEVICE = torch.device("cuda", 0)


@pytest.fixture
def choose(monkeypatch):
    """The choice for a 512 x 256 weight by a table of two buckets, whatever the machine."""
    monkeypatch.setattr(tuning, "tuned", lambda device: {"512x256": {1: FMA, 16: MMA, 64: None}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tuning._chosen.cache_clear()
    yield lambda num_tokens, n=512, m=256, dtype=torch.bfloat16, gated=False: tuning._chosen(
        DEVICE, dtype, n, m, num_tokens, gated
    )
    tuning._chosen.cache_clear()


def test_a_product_takes_the_bucket_that_holds_it(choose):
    assert choose(1) is FMA
    assert choose(2) is MMA
    assert choose(16) is MMA
    assert choose(17) is None  # cuBLAS by the table
    assert choose(65) is None  # beyond the last bucket


def test_other_shapes_follow_the_rule(choose):
    assert choose(1, n=513) == default_launch(513, 256, 1, gated=False)
    assert choose(9, gated=True) == default_launch(512, 256, 9, gated=True)
    assert choose(TOKEN_BUCKETS[-1] + 1, n=513) is None


def test_what_triton_does_not_do_is_cublas(choose, monkeypatch):
    assert choose(1, dtype=torch.float32) is None
    assert choose(4, m=252) is None  # rows that are no multiple of 16 bytes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(1, n=514) is None


def test_invariant_launches_do_not_split_the_inputs_and_agree_on_their_order():
    x, weight = torch.empty(1, 64, dtype=torch.bfloat16), torch.empty(8, 64, dtype=torch.bfloat16)
    with use_backend(Backend.TRITON):
        for gated in (False, True):
            launches = [launch_for(x.expand(t, 64), weight, gated=gated, invariant=True) for t in (1, 17, 65, 4096)]
            assert {launch.splits for launch in launches} == {1}
            assert {launch.block_m for launch in launches} == {64}
            assert {launch.kernel for launch in launches} == {"mma"}
    assert launch_for(x, weight, gated=False, invariant=True) is None  # the CPU's product is so already


def test_a_table_is_read_as_it_was_written():
    shapes = {"512x256": {16: MMA, 1: FMA, 64: None}, "gated 64x32": {1: None}}
    text = format_table("Some GPU", {"triton": "3.6.0"}, shapes)
    assert parse_table(json.loads(text)) == shapes
    assert list(parse_table(json.loads(text))["512x256"]) == [1, 16, 64]


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_tables(path):
    content = json.loads(path.read_text("utf-8"))
    shapes = parse_table(content)
    assert path.name == tuning.table_name(content["device"])
    assert path.read_text("utf-8") == format_table(content["device"], content["versions"], shapes)
    for by_bucket in shapes.values():
        assert tuple(by_bucket) == TOKEN_BUCKETS
        for bucket, launch in by_bucket.items():
            assert launch is None or (bucket == 1 if launch.kernel == "fma" else launch.block_t <= 256)
