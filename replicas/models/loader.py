"""Build a model and fill it from safetensors files, reading only the rank's part of each tensor.

A tensor that a layer needs (layers/weights.py) and the checkpoint lacks, or the reverse, is an
error.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from ...kernels.linear.silu_mul import ACTIVATIONS
from ...quant.methods.linear_method import STORED_FLOATS, MethodFor
from ...quant.methods.unquantized import UnquantizedLinear
from ..config import ResolvedConfig
from ..errors import ModelError, ServingError
from ..layers.weights import Source, WeightSlot
from ..parallel.comm import ParallelContext
from .checkpoint import TensorInfo, list_tensors, read_json
from .decoder import DecoderModel
from .families import decoder_spec

__all__ = ["DecoderModel", "load_model"]

# The decoder's name in checkpoints: causal, multimodal (two spellings), bare.
_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
# Old checkpoints store these derived tensors.
_DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_NOT_TEXT = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")


def load_model(
    config: ResolvedConfig,
    device: torch.device,
    comm: ParallelContext | None = None,
    method_for: MethodFor | None = None,
) -> DecoderModel:
    """The rank's part of the model, its weights in `config.model.dtype` on `device`.

    With load_format "dummy" the weights are random and the folder needs only config.json. method_for: replaces the
    methods that config.json asks for. Raises ModelError for anything in the checkpoint that is missing, damaged,
    misshapen, not a number or not understood.
    """
    folder = Path(config.model.path)
    if config.model.load_format not in ("safetensors", "dummy"):
        raise ModelError(f"load_format {config.model.load_format!r} is not supported; use safetensors or dummy")
    # The headers first: a damaged file is found before memory is allocated.
    tensors = list_tensors(folder) if config.model.load_format == "safetensors" else None
    model = _build(config, folder, comm or ParallelContext(), device, method_for)
    if tensors is None:
        _fill_randomly(model, config.model.seed)
    else:
        _fill(model, tensors, folder)
    model.prepare()
    return model.eval()


def _build(
    config: ResolvedConfig,
    folder: Path,
    comm: ParallelContext,
    device: torch.device,
    method_for: MethodFor | None,
) -> DecoderModel:
    """The model of config.json, its weights not yet set."""
    text_config = _text_config(folder)
    path = folder / "config.json"
    spec = decoder_spec(path, read_json(path))
    if spec.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError(f"{path}: activation {spec.hidden_act!r} is not supported; known: {known}")
    method_for = method_for or _linear_methods(folder, text_config, config.batch_invariant)
    try:
        return DecoderModel(
            spec,
            text_config,
            comm,
            method_for,
            max_model_len=config.model.max_model_len,
            dtype=getattr(torch, config.model.dtype),
            device=device,
            batch_invariant=config.batch_invariant,
        )
    except ServingError:
        raise
    except Exception as error:  # a bad value fails at its first use, in transformers' ropes too
        raise ModelError(
            f"the model that {folder / 'config.json'} describes cannot be built: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _text_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers' strict dataclasses raise
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder / 'config.json'} is not understood: {reason}") from error
    text = config.get_text_config()
    if text is not config:
        # Quantization and tying are said once, at the top.
        text.tie_word_embeddings = config.tie_word_embeddings
        text.quantization_config = getattr(config, "quantization_config", None)
    return text


def _linear_methods(folder: Path, config: Any, batch_invariant: bool) -> MethodFor:
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ModelError(f"{folder / 'config.json'} asks for quantization {method!r}, which is not supported")
    plain = UnquantizedLinear(batch_invariant)
    return lambda _name, _kind: plain


def _fill(model: DecoderModel, tensors: Mapping[str, TensorInfo], folder: Path) -> None:
    """Fills every weight and accounts for every tensor."""
    prefix = next((p for p in _PREFIXES if f"{p}embed_tokens.weight" in tensors or f"{p}norm.weight" in tensors), None)
    if prefix is None:
        raise ModelError(f"{folder} has no tensor model.embed_tokens.weight; its files are not of a language model")
    head = "language_model.lm_head" if "language_model.lm_head.weight" in tensors else "lm_head"
    with ExitStack() as stack:
        files: dict[Path, Any] = {}
        for slot in model.weight_slots(prefix, head):
            source = next((source for source in slot.sources if source.name in tensors), None)
            if source is None:
                names = " or ".join(source.name for source in slot.sources)
                raise ModelError(f"{folder} lacks tensor {names}, which the model needs")
            info = tensors[source.name]
            if info.file not in files:
                files[info.file] = stack.enter_context(_open(info.file))
            _read(files[info.file], info, source, slot)
    _refuse_unknown(model, tensors, prefix, head)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be opened: {' '.join(str(error).split())}") from error


def _read(file: Any, info: TensorInfo, source: Source, slot: WeightSlot) -> None:
    """Copy a part of one tensor into its slot, cast to the slot's dtype."""
    where = f"{info.file}: tensor {source.name}"
    if info.shape != source.shape:
        raise ModelError(f"{where} has shape {list(info.shape)}; config.json makes it {list(source.shape)}")
    if info.dtype not in slot.stored:
        expected = "F32, F16 or BF16" if slot.stored == STORED_FLOATS else " or ".join(slot.stored)
        raise ModelError(f"{where} has dtype {info.dtype}; expected {expected}")
    if not slot.target.numel():
        return
    try:
        part = file.get_slice(source.name)[source.index or ...]
    except SafetensorError as error:
        raise ModelError(f"{where} cannot be read: {error}") from error
    target = slot.target
    if slot.offset:
        part = part.to(target.dtype) + slot.offset
    target.copy_(part.view(target.shape))
    if not slot.finite:
        return
    low, high = target.aminmax()  # NaN propagates to both; one pass, no temporary
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ModelError(f"{where} holds NaN or infinite values (as {str(target.dtype).removeprefix('torch.')})")


def _refuse_unknown(model: DecoderModel, tensors: Mapping[str, TensorInfo], prefix: str, head: str) -> None:
    """Refuse a tensor of no layer and no other stage, except known superfluous ones."""
    known = {source.name for slot in model.weight_slots(prefix, head) for source in slot.sources}
    foreign_layers = set(range(len(model.spec.layers))) - set(model.layer_range)
    other_stage = {f"{prefix}layers.{index}." for index in foreign_layers}
    if model.comm.pp_size > 1:
        other_stage |= {f"{prefix}embed_tokens.", f"{prefix}norm.", f"{head}."}
    if model.spec.tie_word_embeddings:
        known.add(f"{head}.weight")  # a copy of the embedding, written by some tools
    multimodal = "language_model" in prefix
    for name, info in tensors.items():
        superfluous = _DERIVED.search(name) or (multimodal and _NOT_TEXT.match(name))
        if name not in known and not superfluous and not name.startswith(tuple(other_stage)):
            raise ModelError(
                f"{info.file}: tensor {name} is not understood; config.json describes {len(model.spec.layers)} layers "
                "that have no such weight"
            )


def _fill_randomly(model: DecoderModel, seed: int) -> None:
    """Small normal weights and norms of one; ranks of equal seeds hold parts of one model.

    Values follow from the tensor's name. Of a split tensor each rank makes all and keeps its part.
    """
    generator = torch.Generator(next(model.parameters()).device)
    for slot in model.weight_slots("model.", "lm_head"):
        source, target = slot.sources[0], slot.target
        if target.dim() == 1 and "norm" in source.name:
            target.fill_(1.0)
            continue
        generator.manual_seed(zlib.crc32(f"{seed} {source.name}".encode()))
        if target.shape == source.shape:
            target.normal_(0.0, 0.02, generator=generator)
        else:
            whole = torch.empty(source.shape, dtype=target.dtype, device=target.device)
            target.copy_(whole.normal_(0.0, 0.02, generator=generator)[source.index])
