"""A whole decoder on the Triton kernels, interpreted, gives what it gives on torch: the seams between the two."""

from __future__ import annotations

import pytest
import torch

from shoal.kernels.backend import Backend, use_backend
from tests.support import paged
from tests.support.checkpoints import FAMILIES, VOCAB_SIZE


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "qwen3_moe"])
def test_mixed_steps_of_chunks_and_decode(family, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled in this process, not interpreted")
    monkeypatch.setattr(paged, "BLOCK_SIZE", 16)
    folder = FAMILIES[family](tmp_path / family)
    prompt = torch.randint(2, VOCAB_SIZE - 8, (40,), generator=torch.Generator().manual_seed(4)).tolist()
    steps = [[(0, prompt[:19])], [(0, [prompt[19]]), (1, prompt[20:31])], [(0, [prompt[31]]), (1, [prompt[32]])]]

    def run() -> list[torch.Tensor]:
        model = paged.PagedModel(folder)
        return [model.logits(step) for step in steps]

    want = run()
    with use_backend(Backend.INTERPRET):
        got = run()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
