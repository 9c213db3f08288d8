"""Checkpoints whose level weights are of another kind than the default is today, loaded after `convert`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llcompile.weights.level_kinds import KINDS


def take_kind(weights: Any, found: Tensor) -> None:
    """Give `LevelWeights` the kind that a checkpoint's descriptor `found` tells of, if nobody asked for theirs.

    Only where nothing can be lost: they are as they were made, and the sizes [H, L, D] are the same. Their parameters
    are new objects then, so it must come before the optimizer is made. Anything else is left to the check that follows.
    """
    if not weights.by_default or found.is_meta or not _as_made(weights):
        return
    for kind, entry in KINDS.items():
        if kind == weights.kind or not entry.needs_input:
            continue
        sizes = type(weights).sizes_of(kind, weights.heads, weights.levels, weights.in_features)
        if torch.equal(found.cpu(), weights.description(kind, sizes).to(found.dtype)):
            weights.become(kind, sizes)
            return


def _as_made(weights: Any) -> bool:
    tensors = [tensor for _, tensor in weights.tensors()]
    plain = all(
        type(tensor) in (Tensor, nn.Parameter) for tensor in tensors
    )  # no shards, which a wrapper keeps account of
    return plain and (all(tensor.is_meta for tensor in tensors) or weights.is_identity())
