"""Whatever the bytes of a checkpoint are, reading it ends in a model or in one line that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from shoal.replicas.errors import ModelError
from shoal.replicas.models import checkpoint
from shoal.replicas.models.checkpoint import INDEX_FILE, list_tensors, read_header, read_model_facts
from shoal.replicas.models.loader import load_model
from tests.support.checkpoints import FAMILIES
from tests.support.paged import CPU, engine_config

SIZES = st.one_of(st.integers(-3, 9), st.sampled_from([2**31, 2**63, 2**64, 10**400]))
NONSENSE = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.just([]), st.just({}), st.just([[1]])
)
NUMBERS = st.one_of(SIZES, SIZES, NONSENSE)
ENTRIES = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F4", "F32"]), NONSENSE),
            "shape": st.one_of(st.lists(NUMBERS, max_size=3), NONSENSE),
            "data_offsets": st.one_of(st.tuples(NUMBERS, NUMBERS), st.lists(NUMBERS, max_size=3), NONSENSE),
        }
    ),
    NONSENSE,
)


def refusal(read: Callable[[], Any], *names: str) -> str | None:
    """The ModelError's message, which is one line and holds `names`; None where there was none."""
    try:
        read()
    except ModelError as error:
        message = error.message
    else:
        return None
    assert "\n" not in message
    assert all(name in message for name in names)
    return message


def write_header(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "model.safetensors"


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4), ENTRIES, max_size=3), st.integers(0, 40))
def test_headers_of_any_content(file: Path, header: dict, num_bytes: int) -> None:
    write_header(file, json.dumps(header).encode(), bytes(num_bytes))
    message = refusal(lambda: read_header(file), file.name)
    if message is None:
        assert all(type(size) is int and size >= 0 for info in read_header(file).values() for size in info.shape)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_files_with_flipped_and_lost_bytes(file: Path, data: st.DataObject) -> None:
    """safetensors itself opens every file that passes."""
    save_file({"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.int8)}, file)
    content = bytearray(file.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    refusal(lambda: read_header(file), file.name)


def test_headers_that_would_cost_much(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_header(file, b"[" * 100_000, b"")
    assert refusal(lambda: read_header(file), file.name)
    write_header(file, b"{}", b"", length=2**63)
    assert refusal(lambda: read_header(file), file.name)
    monkeypatch.setattr(checkpoint, "MAX_HEADER_BYTES", 100)
    write_header(file, b"{}".ljust(101), b"")
    assert "allows 100" in str(refusal(lambda: read_header(file), file.name))


def test_data_that_belongs_to_no_tensor(file: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_header(file, json.dumps({"a": entry}).encode(), bytes(12))
    assert "12 bytes of data" in str(refusal(lambda: read_header(file), file.name))


@pytest.mark.parametrize("place", [5, None, [], "../model.safetensors", "/etc/passwd", ""])
def test_an_index_that_points_elsewhere(place: object, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": place}}))
    assert refusal(lambda: list_tensors(tmp_path), INDEX_FILE)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\xff"}'], ids=lambda text: text[:8]
)
def test_json_that_python_cannot_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(lambda: read_model_facts(tmp_path), "config.json")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["llama"](tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", 1),
        ("architectures", {"a": 1}),
        ("architectures", [[]]),
        ("text_config", 5),
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**15),
        ("vocab_size", 10**40),
        ("eos_token_id", 2.5),
        ("eos_token_id", {"a": 1}),
    ],
)
def test_facts_that_make_no_sense(key: str, value: object, llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert refusal(lambda: read_model_facts(tmp_path), key if key != "text_config" else "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", ""),
        ("intermediate_size", -1),
        ("intermediate_size", 10**15),
        ("intermediate_size", 10**40),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": None}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
        ("rope_parameters", {"rope_type": [], "rope_theta": 1e4}),
    ],
)
def test_a_config_that_no_model_can_be_built_of(key: str, value: object, llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(llama / "model.safetensors")
    assert refusal(lambda: load_model(engine_config(tmp_path), CPU), "config.json")
