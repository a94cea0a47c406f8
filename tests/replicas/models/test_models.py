"""Every family against transformers: whole prompts, chunks and decode through the paged cache, split over ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.replicas.errors import ConfigError, ModelError
from shoal.replicas.layers.linear import kv_head_range
from shoal.replicas.models.loader import load_model
from shoal.replicas.parallel.comm import ParallelContext
from shoal.replicas.plan import BlockCopy
from tests.support.checkpoints import FAMILIES, VOCAB_SIZE
from tests.support.paged import CPU, PagedModel, engine_config
from tests.support.thread_ranks import run_ranks

PROMPT_LEN = 43  # beyond every window, and no multiple of a block


@dataclass(frozen=True)
class Checkpoint:
    """A family's tiny checkpoint, a prompt, and what transformers makes of it."""

    folder: Path
    prompt: list[int]
    logits: torch.Tensor  # [PROMPT_LEN, vocab]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory) -> Checkpoint:
    folder = FAMILIES[request.param](tmp_path_factory.mktemp("checkpoints") / request.param)
    prompt = torch.randint(2, VOCAB_SIZE - 8, (PROMPT_LEN,), generator=torch.Generator().manual_seed(3))
    oracle = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = oracle(prompt[None]).logits[0].float()
    return Checkpoint(folder, prompt.tolist(), logits)


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    assert want.std() > 0.5  # the oracle says something
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_logits_of_a_whole_prompt(checkpoint):
    assert_same(PagedModel(checkpoint.folder).logits([(0, checkpoint.prompt)]), checkpoint.logits)


def test_chunks_and_decode_in_mixed_steps(checkpoint):
    """Two sequences, one of them behind: steps hold a decode of one beside a chunk of the other, and both decode."""
    model, prompt = PagedModel(checkpoint.folder), checkpoint.prompt
    first = [model.logits([(0, prompt[:17])])]
    second = []
    for step in range(10):
        position, chunk = 17 + step, prompt[3 * step : 3 * step + 3]
        logits = model.logits([(0, prompt[position : position + 1]), (1, chunk)])
        first.append(logits[:1])
        second.append(logits[1:])
    for step in range(PROMPT_LEN - 30):
        tokens = [(1, prompt[30 + step : 31 + step])]
        if step < PROMPT_LEN - 27:
            tokens.insert(0, (0, prompt[27 + step : 28 + step]))
        logits = model.logits(tokens)
        first.append(logits[:-1])
        second.append(logits[-1:])
    assert_same(torch.cat(first), checkpoint.logits[: model.lengths[0]])
    assert_same(torch.cat(second), checkpoint.logits)


def test_a_copied_block_continues_like_its_source(checkpoint):
    model, prompt = PagedModel(checkpoint.folder), checkpoint.prompt
    model.run([(0, prompt[:21])])
    model.cache.copy_blocks([BlockCopy(int(s), int(t)) for s, t in zip(*model.tables[:, :3], strict=True)])
    model.lengths[1] = 21
    assert_same(model.logits([(1, prompt[21:])]), checkpoint.logits[21:])


def test_two_pipeline_stages_make_the_whole(checkpoint):
    first, last = (PagedModel(checkpoint.folder, comm=ParallelContext(pp_rank=i, pp_size=2)) for i in range(2))
    assert len(first.model.layers) + len(last.model.layers) == 3
    hidden = first.run([(0, checkpoint.prompt)])
    assert_same(last.model.compute_logits(last.run([(0, checkpoint.prompt)], hidden)), checkpoint.logits)


def test_two_tensor_parallel_ranks_make_the_whole(checkpoint):
    """Each rank reads its part of every tensor."""

    def work(comm: ParallelContext) -> torch.Tensor:
        return PagedModel(checkpoint.folder, comm=comm).logits([(0, checkpoint.prompt)])

    logits = run_ranks(2, work)
    assert torch.equal(logits[0], logits[1])
    assert_same(logits[0], checkpoint.logits)


def test_kv_heads_are_shared_by_neighbouring_ranks_where_there_are_too_few():
    ranges = [kv_head_range(2, ParallelContext(tp_rank=rank, tp_size=4)) for rank in range(4)]
    assert ranges == [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    with pytest.raises(ConfigError, match="3 is not a multiple of the 2 kv heads"):
        kv_head_range(2, ParallelContext(tp_size=3))


def test_bf16_stays_close_to_fp32(tmp_path):
    """The same model in bf16: nothing overflows, and the top-1 tokens mostly agree."""
    folder = FAMILIES["gemma2"](tmp_path / "gemma2")
    assert engine_config(folder, dtype="bfloat16").model.dtype == "bfloat16"
    model = load_model(engine_config(folder, dtype="bfloat16"), CPU)
    exact = load_model(engine_config(folder), CPU)
    hidden = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    got, want = model.compute_logits(hidden.bfloat16()), exact.compute_logits(hidden)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 0.1
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.9


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_rope_settings_in_the_old_spelling(tmp_path):
    folder = FAMILIES["llama"](tmp_path / "llama")
    prompt = list(range(2, 45))
    want = PagedModel(folder).logits([(0, prompt)])
    new = json.loads((folder / "config.json").read_text())["rope_parameters"]
    scaling = {key: value for key, value in new.items() if key != "rope_theta"}
    _edit_config(folder, rope_parameters=None, rope_theta=new["rope_theta"], rope_scaling=scaling)
    assert torch.equal(PagedModel(folder).logits([(0, prompt)]), want)
    _edit_config(folder, rope_scaling=None)
    assert not torch.allclose(PagedModel(folder).logits([(0, prompt)]), want, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "relu"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"rope_parameters": {"rope_type": "proportional_ntk", "rope_theta": 1e4}}, "proportional_ntk"),
    ],
)
def test_settings_that_are_not_understood_are_named(tmp_path, changes, message):
    folder = FAMILIES["llama"](tmp_path / "llama")
    _edit_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(engine_config(folder), CPU)
