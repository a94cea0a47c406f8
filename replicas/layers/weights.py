"""Weight slots: the parts of checkpoint tensors that fill a layer's parameters.

The loader reads the slots of `layer.weight_slots(prefix)`; prefix is the layer's checkpoint name,
without the final dot. Slots cover every element of every parameter, and no other tensor is loaded:
a checkpoint is understood whole or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...quant.methods.linear_method import STORED_FLOATS, WeightSpec

Index = tuple[slice | int, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A part of a checkpoint tensor: name, expected shape, index of the part."""

    name: str
    shape: tuple[int, ...]
    index: Index = ()


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """Fills `target`, a view of a parameter, from the first of `sources` that the checkpoint has.

    Empty if the rank has no part: the last ranks may have no rows of a small vocabulary. `offset`
    is added to the values (Gemma's norms store w for 1 + w).
    """

    target: torch.Tensor
    sources: tuple[Source, ...]
    offset: float = 0.0
    stored: tuple[str, ...] = STORED_FLOATS  # dtypes accepted, as safetensors spells them
    finite: bool = True  # NaN and infinity are refused

    @classmethod
    def of(cls, spec: WeightSpec, target: torch.Tensor, sources: tuple[Source, ...]) -> WeightSlot:
        """The slot of a linear method's tensor."""
        return cls(target, sources, stored=spec.stored, finite=spec.finite)


class Layer(nn.Module):
    """A module whose call is `forward`.

    nn.Module checks for hooks at every call: 1.3 us x 76 calls, 7 % of a CPU decode step of the
    shipped model.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """An uninitialised parameter without gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
