"""Ranks that do not fit each other are refused, and the error says which and in what."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.replicas.config import EngineConfig, ModelConfig, SchedulerConfig
from shoal.replicas.errors import ModelError, ShardGroupError
from shoal.replicas.executors.rank_facts import RankFacts, check_facts
from shoal.replicas.models.checkpoint import INDEX_FILE
from tests.support.engines import facts

CPU = torch.device("cpu")
FACTS = RankFacts(2, "c0ffee", "1.0", "2.13", "2.28", "3.12", "node boot", "node", "GPU-1", {})


def write_weights(folder: Path, *files: dict[str, torch.Tensor]) -> None:
    """A checkpoint of several files, in the place of the one that was there."""
    folder.mkdir(exist_ok=True)
    names = [f"model-{i}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))


def facts_of(folder: Path, load_format: str = "safetensors") -> RankFacts:
    config = EngineConfig(ModelConfig(str(folder), load_format=load_format)).resolve(facts(), "cpu")
    return RankFacts.of(config, CPU)


def test_ranks_that_differ_in_nothing_but_their_gpus_fit():
    check_facts([FACTS, replace(FACTS, device="GPU-2"), replace(FACTS, device="GPU-3", node="other boot")])


def test_ranks_on_cpu_share_it():
    check_facts([replace(FACTS, device="cpu")] * 4)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("world_size", 4, "the size of the group: rank 0 has 2, rank 1 has 4"),
        ("config", "decaf", "the configuration: rank 0 has c0ffee, rank 1 has decaf"),
        ("shoal", "1.1", "the version of Shoal: rank 0 has 1.0, rank 1 has 1.1"),
        ("torch", "2.12", "the version of torch: rank 0 has 2.13, rank 1 has 2.12"),
        ("nccl", "", "the version of NCCL: rank 0 has 2.28, rank 1 has none"),
        ("python", "3.11", "the version of Python: rank 0 has 3.12, rank 1 has 3.11"),
    ],
)
def test_what_ranks_differ_in_is_named(field, value, what):
    with pytest.raises(ShardGroupError) as caught:
        check_facts([FACTS, replace(FACTS, device="GPU-2", **{field: value})])
    assert what in caught.value.message


@pytest.mark.parametrize("node", [FACTS.node, "container boot"])
def test_two_ranks_on_one_gpu_are_refused(node):
    with pytest.raises(ShardGroupError, match="ranks 0 and 2 are on one GPU, GPU-1 of node"):
        check_facts([FACTS, replace(FACTS, device="GPU-2"), replace(FACTS, node=node)])


A, B = {"a": torch.zeros(2, 3)}, {"b": torch.ones(4), "c": torch.ones(2)}


@pytest.mark.parametrize(
    ("others", "differ"),
    [
        ((A, {"b": torch.ones(4), "d": torch.ones(2)}), "1 of 2 files of weights, the first being {}/model-1"),
        ((A, {"b": torch.ones(2, 2), "c": torch.ones(2)}), "1 of 2 files of weights, the first being {}/model-1"),
        (({"a": torch.zeros(2, 3).int()}, B), "1 of 2 files of weights, the first being {}/model-0"),
        (({"a": torch.zeros(2, 4)}, {"b": torch.ones(6)}), "2 of 2 files of weights, the first being {}/model-0"),
        ((A, {name: tensor + 1 for name, tensor in B.items()}), "1 of 2 files of weights, the first being {}/model-1"),
    ],
    ids=["name", "shape", "dtype", "size", "values"],
)
def test_other_weights_at_the_same_path_are_refused(others, differ, tmp_path):
    """The path leads to a folder of each rank's node."""
    path = tmp_path / "model"
    facts = []
    for rank, files in enumerate(((A, B), others)):
        write_weights(tmp_path / f"on-node-{rank}", *files)
        path.symlink_to(tmp_path / f"on-node-{rank}")
        facts.append(replace(facts_of(path), host=f"node-{rank}"))
        path.unlink()
    with pytest.raises(ShardGroupError) as caught:
        check_facts(facts)
    has = r"has \d+ bytes and tensors \w{16}"
    assert f"the ranks differ in {differ.format(path)}.safetensors: rank 0 on node-0 has" in caught.value.message
    assert re.search(f"rank 0 on node-0 {has}, rank 1 on node-1 {has} ", caught.value.message)


def test_a_file_that_a_rank_lacks_is_named(tmp_path):
    write_weights(tmp_path, A, B)
    whole = facts_of(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "model-0.safetensors"}}))
    with pytest.raises(ShardGroupError, match=r"1 of 2 .*model-1\.safetensors: .*, rank 1 on .* has no such file"):
        check_facts([whole, facts_of(tmp_path)])


def test_two_folders_of_the_same_weights_fit_whatever_their_headers_order(tmp_path):
    described = []
    for name, metadata in (("one", {"x": "1", "y": "2"}), ("other", {"y": "2", "x": "1"})):
        (tmp_path / name).mkdir()
        save_file(B, tmp_path / name / "model.safetensors", metadata)
        described += facts_of(tmp_path / name).weights.values()
    assert described[0] == described[1]


def test_of_weights_that_are_not_read_nothing_is_said(tmp_path):
    assert facts_of(tmp_path, "dummy").weights == {}


def test_weights_that_are_missing_are_named(tmp_path):
    with pytest.raises(ModelError, match=re.escape(str(tmp_path))):
        facts_of(tmp_path)


def test_facts_travel_as_json_and_tell_configurations_apart(tmp_path):
    write_weights(tmp_path, A, B)
    config = EngineConfig(ModelConfig(str(tmp_path)))
    own = RankFacts.of(config.resolve(facts(), "cpu"), CPU)
    assert len(own.weights) == 2
    assert RankFacts.from_json(own.to_json()) == own
    other = replace(config, scheduler=SchedulerConfig(9)).resolve(facts(), "cpu")
    assert RankFacts.of(other, CPU).config != own.config


def test_facts_of_another_version_are_refused():
    with pytest.raises(ShardGroupError, match="another version of Shoal"):
        RankFacts.from_json('{"world_size": 2}')
