"""Start-up checks of facts that ranks of a model copy must share, or must not share."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.cuda import nccl

from ... import __version__
from ..config import ResolvedConfig, ResolvedModelConfig
from ..device import this_machine
from ..errors import ShardGroupError
from ..models.checkpoint import list_tensors

_SAMPLED_BYTES = 4096  # data bytes read per file: trainings of one architecture differ there
_EQUAL = {
    "world_size": "the size of the group",
    "config": "the configuration",
    "shoal": "the version of Shoal",
    "torch": "the version of torch",
    "nccl": "the version of NCCL",
    "python": "the version of Python",
}


@dataclass(frozen=True, slots=True)
class RankFacts:
    """One rank's facts, exchanged as JSON."""

    world_size: int
    config: str  # hash
    shoal: str
    torch: str
    nccl: str
    python: str
    node: str
    host: str  # for messages
    device: str  # GPU UUID, or "cpu", which may be shared
    weights: dict[str, str]  # path -> description; {} for random weights

    @classmethod
    def of(cls, config: ResolvedConfig, device: torch.device) -> RankFacts:
        """Raises ModelError if weight files are missing or damaged."""
        on_gpu = device.type == "cuda"
        host, boot = this_machine()
        return cls(
            world_size=config.parallel.world_size,
            config=hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16],
            shoal=__version__,
            torch=torch.__version__,
            nccl=".".join(map(str, nccl.version())) if on_gpu else "",
            python=".".join(platform.python_version_tuple()[:2]),
            node=f"{host} {boot}",
            host=host,
            device=str(torch.cuda.get_device_properties(device).uuid) if on_gpu else "cpu",
            weights=_weights(config.model),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankFacts:
        try:
            return cls(**json.loads(text))
        except TypeError as error:  # another version with other fields
            raise ShardGroupError(f"a rank of another version of Shoal is in the group ({error}); run one") from None


def check_facts(facts: Sequence[RankFacts]) -> None:
    """Raise ShardGroupError, naming the ranks, if they cannot form a group. facts: by rank."""
    for field, what in _EQUAL.items():
        values = [getattr(own, field) for own in facts]
        if len(set(values)) > 1:
            said = ", ".join(f"rank {rank} has {value or 'none'}" for rank, value in enumerate(values))
            raise ShardGroupError(f"the ranks differ in {what}: {said}; start all of them in the same way")
    _check_weights(facts)
    owners: dict[str, int] = {}  # without host: containers with different host names may share a GPU
    for rank, own in enumerate(facts):
        first = owners.setdefault(own.device, rank)
        if first != rank and own.device != "cpu":
            raise ShardGroupError(
                f"ranks {first} and {rank} are on one GPU, {own.device} of {own.host}; every rank needs its own: check "
                "their local ranks and CUDA_VISIBLE_DEVICES"
            )


def _weights(model: ResolvedModelConfig) -> dict[str, str]:
    """Describe files by header and first bytes: 4 ms for 70B parameters, 0.2 s for 36,000 tensors."""
    if model.load_format != "safetensors":
        return {}
    tensors: dict[Path, list[str]] = {}
    for name, info in list_tensors(Path(model.path)).items():
        tensors.setdefault(info.file, []).append(f"{name} {info.dtype} {info.shape}")
    return {str(file): _described(file, sorted(own)) for file, own in tensors.items()}


def _described(file: Path, tensors: list[str]) -> str:
    digest = hashlib.sha256("\n".join(tensors).encode())
    with file.open("rb") as stream:
        stream.seek(int.from_bytes(stream.read(8), "little"), os.SEEK_CUR)  # header length, then header
        digest.update(stream.read(_SAMPLED_BYTES))
    return f"{file.stat().st_size} bytes and tensors {digest.hexdigest()[:16]}"


def _check_weights(facts: Sequence[RankFacts]) -> None:
    """Nodes may have different or incomplete models at one path."""
    files = sorted({file for own in facts for file in own.weights})
    differ = [file for file in files if len({own.weights.get(file) for own in facts}) > 1]
    if not differ:
        return
    said = ", ".join(
        f"rank {rank} on {own.host} has {own.weights.get(differ[0], 'no such file')}" for rank, own in enumerate(facts)
    )
    raise ShardGroupError(
        f"the ranks differ in {len(differ)} of {len(files)} files of weights, the first being {differ[0]}: {said} (a "
        "hash of names, dtypes, shapes and the first values); give every node the same files at that path"
    )
