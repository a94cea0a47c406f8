"""Models of every family with all their Triton kernels, run by the interpreter, against the torch path.

fp32 logits of prompts, of decoding, and of both in one step. Without a GPU this is what shows that layers hand to the
kernels what the kernels expect.
"""

from __future__ import annotations

import os

import pytest
import torch

from shoal.kernels.backend import Backend, use_backend
from tests.support import paged
from tests.support.checkpoints import FAMILIES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled in this process, not interpreted"
)

STEPS = [
    [(0, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])],  # more than one block
    [(0, [3]), (1, [4, 9, 3, 17, 2, 8])],
    [(0, [3]), (1, [4])],
]
QUICK = {"llama", "gemma3", "phi3"}  # plain; windows, caps and norms of heads; part of a head rotated


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_interpreted_kernels_give_the_logits_of_torch(family, tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "BLOCK_SIZE", 16)  # the smallest that attention on a GPU takes
    folder = FAMILIES[family](tmp_path)
    on_torch, interpreted = paged.PagedModel(folder), paged.PagedModel(folder)
    for step in STEPS:
        want = on_torch.logits(step)
        with use_backend(Backend.INTERPRET):
            got = interpreted.logits(step)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
