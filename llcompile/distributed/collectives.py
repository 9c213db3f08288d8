"""Collectives whose names differ between releases of torch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

# The name since torch 2.13, and the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What each process of a group passes, `[n]`, as `[ranks, n]`."""
    ranks = dist.get_world_size(group)
    gathered = x.new_empty(ranks * x.numel())
    _all_gather(gathered, x, group=group)
    return gathered.view(ranks, x.numel())
