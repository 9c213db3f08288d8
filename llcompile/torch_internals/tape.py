"""Tape: gradients that are taken while compiling are none of the program's.

Dynamo compiles in the middle of the first call. Around it the user may count or move what is saved for the backward
(activation checkpointing, offloading), and must not see what a proof saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def own_tape() -> Iterator[None]:
    """Hides what is saved for a backward inside from the hooks on saved tensors outside."""
    allowed = getattr(torch._C._autograd, "_saved_tensors_hooks_is_enabled", lambda: True)
    if not allowed():  # a transform of torch.func forbids hooks, so that there are none
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(_kept, _unchanged):
        yield


def _kept(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, _version(tensor)


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """The tensor; as without hooks, a backward that needs what was written over is an error."""
    tensor, version = kept
    if _version(tensor) != version:
        raise RuntimeError("a tensor that the backward needs was changed in place")
    return tensor


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
