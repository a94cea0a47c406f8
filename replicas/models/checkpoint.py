"""A checkpoint before it is loaded: folder, model facts, tensors. Without torch, for routers."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelFacts
from ..errors import ModelError
from ..model_spec import QKNorm
from .families import TextConfig, text_config

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's limit
# Whole-byte dtypes of safetensors.
_ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A checkpoint tensor: file, dtype as safetensors spells it, shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve_model_path(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: `model` itself, or its snapshot from the Hugging Face Hub.

    Fetches only safetensors, JSON and tokenizer files. Raises ModelError, with the remedy, if there
    is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{folder} is a local folder and has no revision {revision!r}; leave the revision out")
        return folder
    if folder.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no model folder {folder}; give an existing folder or a Hugging Face model id")
    from huggingface_hub import snapshot_download  # takes 0.3 s

    patterns = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the Hub client raises its own, requests' and the system's errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {model!r} is no local folder and could not be fetched from the Hugging Face Hub ({reason}); "
            "check the name and the network, log in if it is gated, or give a local folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing; a model folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_model_facts(folder: Path) -> ModelFacts:
    """Facts from config.json and generation_config.json in `folder`.

    Raises ModelError for an unsupported architecture or a missing or malformed key.
    """
    path = folder / "config.json"
    config = read_json(path)
    family, text = text_config(path, config)
    spec = family.spec(text)
    tensors = list_tensors(folder) if any(folder.glob("*.safetensors")) else {}
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype", "torch_dtype")
    if dtype is None:
        dtype = next((_DTYPES[info.dtype] for info in tensors.values() if info.dtype in _DTYPES), "float32")
    return ModelFacts(
        architecture=(config.get("architectures") or [text.get("model_type")])[0],
        num_layers=len(spec.layers),
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_kv_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=text.integer("max_position_embeddings"),
        eos_token_ids=_eos_token_ids(folder, config, text),
        dtype=str(dtype),
        num_parameters=sum(math.prod(info.shape) for info in tensors.values()),
        intermediate_sizes=spec.mlp_widths,
        mlp_features=spec.mlp_features,
        norms_all_kv_heads=spec.qk_norm is QKNorm.PROJECTION,
    )


def _eos_token_ids(folder: Path, config: dict[str, Any], text: TextConfig) -> tuple[int, ...]:
    """The ids of generation_config.json, which `generate` reads too, else of config.json."""
    generation = folder / "generation_config.json"
    ids = read_json(generation).get("eos_token_id") if generation.exists() else None
    if ids is None:
        ids = config.get("eos_token_id", text.get("eos_token_id"))
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ModelError(f"{folder}: eos_token_id is {ids!r}; expected an integer or a list of them")
    return tuple(dict.fromkeys(ids))


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint, by name, from the files' headers and the index.

    Raises ModelError, naming file and tensor, for a damaged or missing file, a tensor missing from
    its file, and an unknown dtype.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        # Some folders hold a second copy of the weights in their authors' own layout.
        whole = folder / "model.safetensors"
        files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{folder} holds no .safetensors file; only safetensors weights are supported")
        return {name: info for file in files for name, info in read_header(file).items()}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; it should say which file holds each tensor")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or file != Path(file).name:
            raise ModelError(f"{index}: tensor {name!r} is said to be in {file!r}; expected a file of this folder")
        if file not in headers:
            headers[file] = read_header(folder / file)
        if name not in headers[file]:
            raise ModelError(f"{folder / file} lacks tensor {name}, which {INDEX_FILE} promises")
        tensors[name] = headers[file][name]
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, their byte ranges checked against its size.

    Format: 8 bytes little-endian header length, the header as JSON, then the data.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header should take {length} bytes and the file has {size}")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header takes {length} bytes; the format allows {MAX_HEADER_BYTES}")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise ModelError(f"{file} is missing; its tensors are part of the model") from None
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise ModelError(f"{file} is no whole safetensors file: {_one_line(error)}; fetch it again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is no safetensors file: its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    entries = {name: _header_entry(file, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, start, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start != end:
            kind = "overlaps the one before it" if start < end else f"leaves a gap of {start - end} bytes before it"
            raise ModelError(f"{file}: tensor {name} {kind} (bytes {start}..{stop}); the file is damaged")
        if stop > size - 8 - length:
            raise ModelError(
                f"{file} is truncated: tensor {name} ends at byte {stop} of the data, the file has {size - 8 - length}"
            )
        end = stop
    if end != size - 8 - length:
        raise ModelError(
            f"{file} has {size - 8 - length} bytes of data and its tensors end at {end}; the file is damaged"
        )
    return {name: info for name, (info, _, _) in entries.items()}


def _header_entry(file: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor and its byte range. Raises ModelError if dtype, shape and bytes disagree."""
    where = f"{file}: tensor {name if name.isprintable() else ascii(name)}"
    described = _described(entry)
    if described is None:
        raise ModelError(f"{where} is not described as safetensors does it: {entry!r:.200}; fetch the file again")
    dtype, shape, start, stop = described
    elements = math.prod(shape)
    num_bytes = stop - start
    if dtype not in _ELEMENT_BYTES:
        raise ModelError(f"{where} has dtype {dtype!r}, which is not known; known are {', '.join(_ELEMENT_BYTES)}")
    if elements * _ELEMENT_BYTES[dtype] != num_bytes:
        raise ModelError(
            f"{where} has {num_bytes} bytes; its shape {list(shape)} and dtype {dtype} make it "
            f"{elements * _ELEMENT_BYTES[dtype]}; the file is damaged"
        )
    return TensorInfo(file, dtype, shape), start, stop


def _described(entry: Any) -> tuple[str, tuple[int, ...], int, int] | None:
    """dtype, shape and byte range of a header's entry; None if malformed."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    numbers = (*shape, start, stop)
    # 64 bits bound the time and the message length of a damaged shape.
    if isinstance(dtype, str) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        return dtype, shape, start, stop
    return None
