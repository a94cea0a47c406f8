"""Checkpoints good and bad: both layouts of experts, the parts of ranks, and one line for each kind of damage."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shoal.replicas.config import ResolvedConfig
from shoal.replicas.errors import ModelError
from shoal.replicas.models import loader
from shoal.replicas.models.checkpoint import INDEX_FILE, list_tensors, read_model_facts
from shoal.replicas.models.decoder import DecoderModel
from shoal.replicas.models.loader import load_model
from shoal.replicas.parallel.comm import ParallelContext
from tests.support.checkpoints import FAMILIES
from tests.support.paged import CPU, PagedModel, engine_config

WEIGHTS = "model.safetensors"
PROMPT = list(range(2, 30))


@pytest.fixture
def llama(tmp_path) -> Path:
    return FAMILIES["llama"](tmp_path / "llama")


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dictionary of the folder's tensors and saves it again."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def failure(folder: Path) -> str:
    """The message of the ModelError that loading raises: one line."""
    with pytest.raises(ModelError) as caught:
        load_model(engine_config(folder), CPU)
    assert "\n" not in caught.value.message
    return caught.value.message


# Layouts


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_one_by_one_and_stacked(family, tmp_path):
    """What the hub holds names every expert; transformers' own modules stack them. Both are the same model."""
    folder = FAMILIES[family](tmp_path / family)
    want = PagedModel(folder).logits([(0, PROMPT)])
    stacked_before = any(name.endswith("experts.down_proj") for name in list_tensors(folder))
    rewrite(folder, _unstack if stacked_before else _stack)
    assert any(name.endswith("experts.down_proj") for name in list_tensors(folder)) != stacked_before
    assert torch.equal(PagedModel(folder).logits([(0, PROMPT)]), want)


def _stack(tensors: dict[str, torch.Tensor]) -> None:
    for gate in [name for name in tensors if name.endswith((".experts.0.gate_proj.weight", ".experts.0.w1.weight"))]:
        prefix, suffix = gate.split(".experts.0.")
        names = {"gate_proj.weight": ("up_proj.weight", "down_proj.weight"), "w1.weight": ("w3.weight", "w2.weight")}
        up, down = names[suffix]
        parts: dict[str, list[torch.Tensor]] = {suffix: [], up: [], down: []}
        expert = 0
        while f"{prefix}.experts.{expert}.{suffix}" in tensors:
            for part, found in parts.items():
                found.append(tensors.pop(f"{prefix}.experts.{expert}.{part}"))
            expert += 1
        mlp = prefix.replace("block_sparse_moe", "mlp")
        tensors[f"{mlp}.experts.gate_up_proj"] = torch.cat((torch.stack(parts[suffix]), torch.stack(parts[up])), 1)
        tensors[f"{mlp}.experts.down_proj"] = torch.stack(parts[down])


def _unstack(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".experts.gate_up_proj")]:
        prefix = name.removesuffix(".gate_up_proj")
        for expert, (pair, down) in enumerate(zip(tensors.pop(name), tensors.pop(f"{prefix}.down_proj"), strict=True)):
            gate, up = pair.chunk(2)
            for part, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                tensors[f"{prefix}.{expert}.{part}.weight"] = weight


def test_sharded_files_are_one_model(llama):
    want = PagedModel(llama).logits([(0, PROMPT)])
    _shard(llama)
    assert torch.equal(PagedModel(llama).logits([(0, PROMPT)]), want)


def _shard(folder: Path) -> dict[str, str]:
    """Splits the weights over two files and an index; returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_superfluous_tensors_of_old_checkpoints_are_passed_over(tmp_path):
    folder = FAMILIES["llama_biased_tied"](tmp_path / "tied")
    want = PagedModel(folder).logits([(0, PROMPT)])

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    rewrite(folder, add)
    assert torch.equal(PagedModel(folder).logits([(0, PROMPT)]), want)


def test_half_precision_weights_are_cast(llama):
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    rewrite(llama, halve)
    edit_json(llama / "config.json", dtype=None)
    assert read_model_facts(llama).dtype == "bfloat16"
    logits = PagedModel(llama).logits([(0, PROMPT)])
    rewrite(llama, lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}))
    assert torch.equal(PagedModel(llama).logits([(0, PROMPT)]), logits)


def test_dummy_weights_need_only_a_config_and_follow_the_seed(llama):
    (llama / WEIGHTS).unlink()
    hidden = torch.randn(3, 64)
    logits = [
        load_model(engine_config(llama, load_format="dummy", seed=seed), CPU).compute_logits(hidden)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])
    assert all(value.isfinite().all() for value in logits)


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
@pytest.mark.parametrize("family", ["llama", "llama_biased_tied", "mixtral"])
def test_ranks_hold_parts_of_one_model(family, load_format, tmp_path):
    """What the ranks have of a tensor, put together as it was split, is the tensor of a single rank."""
    config = engine_config(FAMILIES[family](tmp_path), load_format=load_format)
    contexts = [ParallelContext(tp_rank=rank, tp_size=2) for rank in range(2)]
    whole, *parts = (_filled(config, context) for context in (ParallelContext(), *contexts))
    for name, (tensor, _) in whole.items():
        rebuilt = torch.zeros_like(tensor)
        for part in parts:
            own, index = part.get(name, (tensor[:0], (slice(0, 0),)))
            rebuilt[index or ...] = own.view(rebuilt[index or ...].shape)
        assert torch.equal(rebuilt, tensor), name


def test_ranks_beyond_a_small_vocabulary_load_without_rows_of_it(llama):
    def cut(tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:20]

    rewrite(llama, cut)
    edit_json(llama / "config.json", vocab_size=20, eos_token_id=19)
    filled = [_filled(engine_config(llama), ParallelContext(tp_rank=rank, tp_size=4)) for rank in range(4)]
    assert [len(own["lm_head.weight"][0]) for own in filled] == [16, 4, 0, 0]


def _filled(config: ResolvedConfig, context: ParallelContext) -> dict[str, tuple[torch.Tensor, tuple]]:
    """Every slot's tensor, and where in its source it lies, by the source's name."""
    filled = {}

    def keep(model: DecoderModel) -> None:
        for slot in model.weight_slots("model.", "lm_head"):
            filled[slot.sources[0].name] = slot.target.clone(), slot.sources[0].index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecoderModel, "prepare", keep)
        load_model(config, CPU, context)
    return filled


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_rank_reads_its_part_of_the_file_alone(family, tmp_path, monkeypatch):
    """Norms and what is as small are read by every rank, and all else once."""
    config = engine_config(FAMILIES[family](tmp_path))
    read: list[int] = []
    monkeypatch.setattr(loader, "safe_open", lambda file, framework: CountedFile(safe_open(file, framework), read))
    totals = []
    for context in (ParallelContext(), *(ParallelContext(tp_rank=rank, tp_size=4) for rank in range(4))):
        read.clear()
        load_model(config, CPU, context)
        totals.append(sum(read))
    whole = sum(math.prod(info.shape) for info in list_tensors(tmp_path).values())
    assert totals[0] == whole
    assert all(total < 0.4 * whole for total in totals[1:]), totals  # two of the four ranks share each kv head


class CountedFile:
    """A safetensors file that notes how many elements are read of it."""

    def __init__(self, file, read: list[int]) -> None:
        self._file, self._read = file, read

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def get_slice(self, name: str):
        return _CountedSlice(self._file.get_slice(name), self._read)


class _CountedSlice:
    def __init__(self, part, read: list[int]) -> None:
        self._part, self._read = part, read

    def __getitem__(self, index) -> torch.Tensor:
        tensor = self._part[index]
        self._read.append(tensor.numel())
        return tensor


# Damage


def test_no_weights(llama):
    (llama / WEIGHTS).unlink()
    assert "holds no .safetensors file" in failure(llama)


def test_a_missing_shard(llama):
    file = next(iter(_shard(llama).values()))
    (llama / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing"):
        read_model_facts(llama)


def test_an_index_that_promises_too_much(llama):
    weight_map = _shard(llama)
    file = next(iter(weight_map.values()))
    (llama / INDEX_FILE).write_text(json.dumps({"weight_map": {**weight_map, "model.extra": file}}))
    with pytest.raises(ModelError, match=f"{file} lacks tensor model.extra"):
        read_model_facts(llama)


def test_other_weights_beside_the_models_own_are_passed_over(llama):
    """Some hub folders hold the same weights a second time, in the authors' own layout."""
    save_file({"layers.0.wq.weight": torch.zeros(2, 2)}, llama / "consolidated.safetensors")
    assert not any("wq" in name for name in list_tensors(llama))


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.99])
def test_a_truncated_file(kept, llama):
    path = llama / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ModelError) as caught:
        list_tensors(llama)
    assert WEIGHTS in caught.value.message
    assert "\n" not in caught.value.message
    if isinstance(kept, float):
        assert "truncated: tensor " in caught.value.message


def edit_last_entry(path, edit) -> str:
    """Rewrites the header's entry of the tensor whose bytes come last; its name."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    edit(header[name])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return name


@pytest.mark.parametrize(("shift", "word"), [(-4, "overlaps"), (4, "gap")])
def test_byte_ranges_that_do_not_join(shift, word, llama):
    name = edit_last_entry(
        llama / WEIGHTS, lambda entry: entry.update(data_offsets=[offset + shift for offset in entry["data_offsets"]])
    )
    with pytest.raises(ModelError, match=f"{WEIGHTS}: tensor {name} .*{word}"):
        list_tensors(llama)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda entry: entry.update(dtype="Q7"), "dtype 'Q7'"),
        (lambda entry: entry.update(dtype="F64"), "make it"),
        (lambda entry: entry.update(shape=[1, 2]), "make it 8"),
        (lambda entry: entry.update(shape="wide"), "not described"),
        (lambda entry: entry.pop("shape"), "not described"),
        (lambda entry: entry.update(data_offsets=[0]), "not described"),
    ],
)
def test_headers_that_contradict_themselves(edit, word, llama):
    name = edit_last_entry(llama / WEIGHTS, edit)
    with pytest.raises(ModelError, match=f"{WEIGHTS}: tensor {name} .*{word}"):
        list_tensors(llama)


def test_a_missing_tensor(llama):
    rewrite(llama, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    message = failure(llama)
    assert "lacks tensor model.layers.1.self_attn.k_proj.weight" in message
    assert str(llama) in message


def test_a_tensor_that_is_not_understood(llama):
    rewrite(llama, lambda tensors: tensors.update({"model.layers.1.self_attn.sinks": torch.zeros(4)}))
    assert f"{WEIGHTS}: tensor model.layers.1.self_attn.sinks is not understood" in failure(llama)


def test_a_misshapen_tensor(llama):
    name = "model.layers.2.mlp.up_proj.weight"
    rewrite(llama, lambda tensors: tensors.update({name: torch.zeros(95, 64)}))
    assert f"{WEIGHTS}: tensor {name} has shape [95, 64]; config.json makes it [96, 64]" in failure(llama)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(value, llama):
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = value

    rewrite(llama, poison)
    assert f"{WEIGHTS}: tensor model.layers.0.mlp.down_proj.weight holds NaN or infinite" in failure(llama)


def test_weights_of_a_foreign_dtype(llama):
    name = "model.norm.weight"
    rewrite(llama, lambda tensors: tensors.update({name: torch.ones(64, dtype=torch.int8)}))
    assert f"{WEIGHTS}: tensor {name} has dtype I8" in failure(llama)


def test_a_folder_that_holds_another_kind_of_model(llama):
    rewrite(llama, lambda tensors: tensors.update({f"unet.{name}": tensors.pop(name) for name in list(tensors)}))
    assert "not of a language model" in failure(llama)


def test_an_unknown_load_format(llama):
    with pytest.raises(ModelError, match="pickle"):
        load_model(engine_config(llama, load_format="pickle"), CPU)
