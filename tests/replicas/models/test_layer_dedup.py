"""A model without the layers that are like others, as it runs for the sake of its kernels alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.replicas.models.decoder import DecoderModel
from shoal.replicas.models.loader import load_model
from tests.support.checkpoints import FAMILIES
from tests.support.paged import CPU, PagedModel, engine_config

# Windows of three layers, and how many layers are left: the first, and of the others one for each window.
WINDOWS = {"llama": ([None, None, None], 2), "qwen2": ([None, 8, 8], 2), "gemma2": ([7, None, 7], 3)}


def windows(model: DecoderModel) -> list[int | None]:
    return [layer.layer_spec.window for layer in model.layers]  # pyright: ignore


@pytest.mark.parametrize("family", WINDOWS)
def test_the_first_layer_and_one_of_each_kind_are_left(family: str, tmp_path: Path):
    whole, num_left = WINDOWS[family]
    model = load_model(engine_config(FAMILIES[family](tmp_path)), CPU)
    assert windows(model) == whole
    with model.dedup_layers():
        assert len(model.layers) == num_left
        assert windows(model)[0] == whole[0]
        assert set(windows(model)[1:]) == set(whole[1:])


def test_afterwards_the_model_is_whole(tmp_path: Path):
    folder, prompt = FAMILIES["llama"](tmp_path), [5, 6, 7]
    expected = PagedModel(folder).logits([(0, prompt)])
    paged = PagedModel(folder)
    with pytest.raises(RuntimeError, match="out of memory"), paged.model.dedup_layers():
        raise RuntimeError("out of memory")
    assert paged.logits([(0, prompt)]).equal(expected)
