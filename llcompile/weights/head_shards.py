"""Level weights under tensor parallel: DTensors, of which each process has the rows of its own heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from llcompile.errors import LevelWeightsError
from llcompile.torch_internals.dtensors import is_dtensor
from llcompile.weights.level_kinds import find_kind
from llcompile.weights.level_weights import LevelWeights


def shard(weights: LevelWeights, mesh: Any, dims: Sequence[int], src_data_rank: int | None = None) -> None:
    """Split level weights by heads over some dimensions of a mesh, in place; a single set is kept by all.

    What has no heads is replicated, because it is learned from the heads of all processes.

    Args:
        weights: whole, and the same on all processes.
        mesh: the processes.
        dims: those of its dimensions.
        src_data_rank: the rank in each dimension whose values count; None: each process uses its own.

    Raises:
        LevelWeightsError: they are split already, or their number is no multiple of the processes.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ways = math.prod(mesh.size(i) for i in dims)
    if any(is_dtensor(tensor) for _, tensor in weights.tensors()):
        raise LevelWeightsError(f"level weights ({weights.extra_repr()}) are DTensors already; split them once")
    if weights.heads % ways and weights.heads > 1:
        raise LevelWeightsError(
            f"level weights ({weights.extra_repr()}) cannot be split over {ways} processes: the number of heads must "
            "be a multiple of it. Use fewer processes for the mixer, or leave it whole"
        )
    for entry in find_kind(weights.kind).tensors:
        if not entry.learned:
            continue
        split = entry.by_heads and weights.heads > 1
        placements = [Shard(0) if split and i in dims else Replicate() for i in range(mesh.ndim)]
        own: nn.Parameter = getattr(weights, entry.name)
        spread = distribute_tensor(own.detach(), mesh, placements, src_data_rank=src_data_rank)
        setattr(weights, entry.name, nn.Parameter(spread, requires_grad=own.requires_grad))
