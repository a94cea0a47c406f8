"""What can be told of a checkpoint without loading it: where it is, what it is, which tensors its files hold.

Nothing here imports torch, because routers read models' facts too. transformers' AutoConfig imports torch (its rope
helpers do so at module level), hence config.json is read as plain JSON, with the defaults that transformers gives to
absent keys. Loading a model (loader.py) goes through AutoConfig; a test holds both to the same facts.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ModelFacts
from ..errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the format's own limit
# No model comes near these; a config.json that does would have memory allocated for it before its tensors are seen.
MAX_SIZE = 1 << 28
_LIMITS = {"num_hidden_layers": 4096, "hidden_size": 1 << 20, "num_attention_heads": 1 << 16, "head_dim": 1 << 16}

# Architecture, as config.json spells it -> family of models/families.py, which is the text config's model_type.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "MixtralForCausalLM": "mixtral",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Olmo2ForCausalLM": "olmo2",
}

# What transformers takes for keys that config.json leaves out. Only those that checkpoints in use do leave out:
# the multimodal Gemma 3 writes no more of its text part than differs from the defaults.
_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma2": {"head_dim": 256, "eos_token_id": 1},
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "eos_token_id": 1,
    },
    "qwen3": {"head_dim": 128},
    "mixtral": {"max_position_embeddings": 131_072, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131_072, "eos_token_id": 2},
    "llama": {"max_position_embeddings": 2048, "eos_token_id": 2},
    "phi3": {"eos_token_id": 32_000},
    "olmo2": {"eos_token_id": 50_279},
}

# How many experts a layer has; which of the keys is written depends on the version of transformers.
_NUM_EXPERTS = {"num_local_experts", "num_experts"}

# Bytes of an element of every dtype that safetensors has in whole bytes.
_ELEMENT_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: its file, its dtype as safetensors spells it, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def resolve_model_path(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: `model` itself if it is a folder, else its snapshot from the Hugging Face Hub.

    Only safetensors, JSON and tokenizer files are fetched. Raises ModelError, with what to do, where there is neither.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{folder} is a local folder and has no revision {revision!r}; leave the revision out")
        return folder
    if folder.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") > 1:
        raise ModelError(f"there is no model folder {folder}; give an existing folder or a Hugging Face model id")
    from huggingface_hub import snapshot_download  # 0.3 s, and only needed for models that are not local

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
    """A JSON object from a file of the checkpoint. Raises ModelError naming the file."""
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


def family_of(architectures: list[str] | None, model_type: str | None) -> str:
    """The family of the first architecture; a text config without one is named by its model_type."""
    if architectures and not (isinstance(architectures, list) and isinstance(architectures[0], str)):
        raise ModelError(f"architectures is {architectures!r}; expected a list of names")
    if not architectures and model_type in ARCHITECTURES.values():
        return str(model_type)
    architecture = architectures[0] if architectures else None
    if architecture not in ARCHITECTURES:
        named = f"architecture {architecture!r}" if architecture else f"model_type {model_type!r}"
        raise ModelError(f"{named} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[architecture]


def read_model_facts(folder: Path) -> ModelFacts:
    """What the engine must know of the model in `folder`, from config.json and generation_config.json.

    Raises ModelError for an architecture that is not supported or a key that is missing or no integer.
    """
    path = folder / "config.json"
    config = read_json(path)
    try:
        family = family_of(config.get("architectures"), config.get("model_type"))
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}") from None
    text = config.get("text_config") or config
    if not isinstance(text, dict):
        raise ModelError(f"{path}: text_config is {text!r}; expected an object")
    text = {**_DEFAULTS.get(family, {}), **text}

    def integer(key: str, default: int | None = None) -> int:
        value = text.get(key)
        value = default if value is None else value
        limit = _LIMITS.get(key, MAX_SIZE)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ModelError(f"{path}: {key} is {value!r}; expected a positive integer, at most {limit}")
        return value

    heads = integer("num_attention_heads")
    kv_heads = integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    for key in _NUM_EXPERTS & text.keys():
        if (chosen := integer("num_experts_per_tok", 1)) > (experts := integer(key)):
            raise ModelError(f"{path}: num_experts_per_tok {chosen} is above {key} {experts}")
    hidden_size = integer("hidden_size")
    tensors = list_tensors(folder) if any(folder.glob("*.safetensors")) else {}
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    if dtype is None:
        dtype = next((_DTYPES[info.dtype] for info in tensors.values() if info.dtype in _DTYPES), "float32")
    return ModelFacts(
        architecture=(config.get("architectures") or [family])[0],
        num_layers=integer("num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=integer("head_dim", hidden_size // heads),
        vocab_size=integer("vocab_size"),
        max_position_embeddings=integer("max_position_embeddings"),
        eos_token_ids=_eos_token_ids(folder, config, text),
        dtype=str(dtype),
        num_parameters=sum(math.prod(info.shape) for info in tensors.values()),
        intermediate_sizes=tuple(integer(key) for key in _intermediate_keys(family, text) if text.get(key) is not None),
        mlp_features=_mlp_features(family, text, integer),
        norms_all_kv_heads=family == "olmo2",
    )


def _intermediate_keys(family: str, text: dict[str, Any]) -> list[str]:
    """The keys that give the widths of a model's MLPs: one, or two where some layers have experts and others none."""
    if family != "qwen3_moe":
        return ["intermediate_size"]
    dense = bool(text.get("mlp_only_layers")) or text.get("decoder_sparse_step", 1) != 1
    return ["moe_intermediate_size", *(["intermediate_size"] if dense else [])]


def _mlp_features(family: str, text: dict[str, Any], integer: Callable[[str], int]) -> tuple[int, ...]:
    """Intermediate features of each layer, those of all its experts; empty where config.json leaves a number out.

    integer: the number that a key has. Raises ModelError for one that has none.
    """
    experts, own = sorted(_NUM_EXPERTS & text.keys()), _intermediate_keys(family, text)
    sparse = family in ("mixtral", "qwen3_moe")
    if any(text.get(key) is None for key in own) or (sparse and not experts):
        return ()
    num_layers = integer("num_hidden_layers")
    if not sparse:
        return (integer(own[0]),) * num_layers
    mixture = integer(own[0]) * integer(experts[0])
    if len(own) == 1:
        return (mixture,) * num_layers
    step = integer("decoder_sparse_step") if "decoder_sparse_step" in text else 1
    dense = text.get("mlp_only_layers") or []
    if not isinstance(dense, list):  # what is wrong with it is told as the model is loaded
        return ()
    return tuple(mixture if i not in dense and (i + 1) % step == 0 else integer(own[1]) for i in range(num_layers))


def _eos_token_ids(folder: Path, config: dict[str, Any], text: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: of generation_config.json where it names any, as `generate` does, else of config.json."""
    generation = folder / "generation_config.json"
    ids = read_json(generation).get("eos_token_id") if generation.exists() else None
    if ids is None:
        ids = config.get("eos_token_id", text.get("eos_token_id"))
    ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ModelError(f"{folder}: eos_token_id is {ids!r}; expected an integer or a list of them")
    return tuple(dict.fromkeys(ids))


def list_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the checkpoint, by name, from the files' headers.

    Follows the index of a sharded checkpoint. Raises ModelError, naming file and tensor, for a missing, truncated or
    overlapping file, for a tensor that the index promises and its file lacks, and for one of an unknown dtype.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        # Some folders hold a second copy of the weights under another name, in their authors' own layout.
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
    """The tensors of one safetensors file, whose byte ranges are checked against its size.

    Format: 8 bytes little-endian header length, that much JSON, then the data that the header's offsets point into.
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
    """A tensor and where its bytes are. Raises ModelError where dtype, shape and number of bytes do not agree."""
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
    """dtype, shape and byte range of a header's entry; None where it is of another form."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        return None
    numbers = (*shape, start, stop)
    # 64 bits bound the time that the product of a damaged shape takes, and the length of its message.
    if isinstance(dtype, str) and all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        return dtype, shape, start, stop
    return None
