"""Owner input: what a module was called with, for a frame that is a part of its forward and no longer holds it.

A graph break between a mixer's projection and its mixing (a hook that prints, `.item()`, a projection that Dynamo does
not trace) leaves queries, keys and values to the second graph, and not the tensor that level weights read. A module
that has level weights keeps its input with them while a call runs eagerly, where such a graph finds it.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# The name under which level weights hold their owner's input.
HELD = "owner_input"
_CALLS = frozenset({nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__})


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of a module's call that is under way."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def holds(self, value: Any) -> bool:
        """Whether an argument is this tensor."""
        return any(tensor is value for tensor in self._tensors())

    def sequence(self, batch: Any, length: Any) -> torch.Tensor | None:
        """The one argument that is [B, T, D], or None where there is none or more than one."""
        fitting = [x for x in self._tensors() if x.dim() == 3 and tuple(x.shape[:2]) == (batch, length)]
        return _only(fitting)

    def of_width(self, width: int) -> torch.Tensor | None:
        """The one argument that is [B, T, width], or None."""
        return _only(x for x in self._tensors() if x.dim() == 3 and x.shape[2] == width)

    def _tensors(self) -> Iterable[torch.Tensor]:
        return (x for x in (*self.args, *self.kwargs.values()) if isinstance(x, torch.Tensor))


def call_under_way(owner: nn.Module) -> ModuleCall | None:
    """The innermost call of a module that Python is in, while a part of it is being compiled; None for no such call."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CALLS and frame.f_locals.get("self") is owner:
            return ModuleCall(tuple(frame.f_locals.get("args", ())), dict(frame.f_locals.get("kwargs", {})))
        frame = frame.f_back
    return None


def _only(tensors: Iterable[torch.Tensor]) -> torch.Tensor | None:
    found = {id(x): x for x in tensors if x.is_floating_point()}
    return next(iter(found.values())) if len(found) == 1 else None
