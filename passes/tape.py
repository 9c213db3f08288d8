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
    with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
