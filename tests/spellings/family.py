"""What a spelling must compute: the definition in float64, on the operands that it names itself."""

from __future__ import annotations

import torch
from torch import Tensor

from llcompile.kernels.reference import reference_attention
from tests.spellings.registry import Operands


def expected(operands: Operands, level_weights: Tensor | None = None) -> Tensor:
    """The family's output [B, T, H * V], normalised where the operands say so."""
    given = dict(operands)
    normaliser = given.pop("normaliser", None)
    early, own = given.pop("early", False), given.pop("own", None)
    if early:
        return _early(given, own, level_weights).flatten(2)
    if normaliser is not None:
        given["v"] = torch.cat([given["v"], torch.ones_like(given["v"][..., :1])], -1)
    o, _ = reference_attention(**given, level_weights=level_weights)
    if normaliser is not None:
        o = o[..., :-1] / normaliser(o[..., -1:])
    return o.flatten(2)


def _early(given: Operands, own: Tensor | None, level_weights: Tensor | None) -> Tensor:
    """What is read of the state before it is written to, and what the own token [B, T, H] adds."""
    read = {**given, "q": given["q"].roll(-1, 1)}
    weights = None if level_weights is None else level_weights.roll(-1, 1)
    o, _ = reference_attention(**read, level_weights=weights)
    o = torch.cat([torch.zeros_like(o[:, :1]), o[:, :-1]], 1)
    return o if own is None else o + own[..., None] * given["v"]
